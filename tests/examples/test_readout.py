"""Reading out frozen encoders: features of every stage, classifiers, neighbours, and where encoders come from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the examples need the extra `examples`")
pytest.importorskip("rich")
pytest.importorskip("tqdm")

import backbones
import knn_eval
import linear_eval
from inputs import image_folders, images, loading
from PIL import Image
from reading import encoders, evaluate
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, WeightsEnum, resnet18

ROOT = Path(__file__).parents[2]

CPU = torch.device("cpu")
STAGES = ["layer1", "layer2", "layer3", "layer4"]


class Small(nn.Module):
    """Four convolutions, under the names of a ResNet's stages."""

    def __init__(self) -> None:
        super().__init__()
        for stage, (width_in, width_out) in zip(STAGES, ((3, 4), (4, 6), (6, 8), (8, 10)), strict=True):
            layers = nn.Conv2d(width_in, width_out, 3, 2, 1), nn.BatchNorm2d(width_out), nn.ReLU()
            self.add_module(stage, nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        for stage in STAGES:
            x = self.get_submodule(stage)(x)
        return x


@pytest.fixture(autouse=True)
def float32_and_a_small_architecture(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.set_default_dtype(torch.float32)
    small = backbones.Architecture(lambda size: Small(), tuple(STAGES))
    monkeypatch.setitem(backbones.ARCHITECTURES, "small", small)
    return


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Sixteen by sixteen colour images of three classes: a bright third in a colour of its own, and noise."""
    arrays = {}
    for part, n in (("train", 48), ("test", 24)):
        labels = np.arange(n) % 3
        pixels = np.random.default_rng(n).integers(0, 60, (n, 16, 16, 3), dtype=np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            image[..., label] += 150
        arrays |= {f"x_{part}": pixels, f"y_{part}": labels}
    np.savez(tmp_path / "tiny.npz", **arrays)
    return tmp_path / "tiny.npz"


@pytest.fixture
def finished(tmp_path: Path, tiny: Path) -> Path:
    """The directory of a run of pretrain.py that has ended, with weights that nobody trained."""
    directory = tmp_path / "runs/loco"
    directory.mkdir(parents=True)
    settings = {"arch": "small", "image_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    settings |= {"data": str(tiny), "data_dir": "data", "method": "loco", "seed": 3}
    (directory / "run.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    torch.save(Small().state_dict(), directory / "backbone.pt")
    return directory


def linear(*argv: Any) -> dict[str, Any]:
    """Read out on the CPU; what linear_eval.json says."""
    assert linear_eval.main([*map(str, argv), "--device", "cpu"]) == 0
    protocol = "paper" if "paper" in argv else "fast"
    where = Path(argv[argv.index("--out") + 1]) if "--out" in argv else Path(argv[0])
    (written,) = where.glob(
        f"linear_eval-{protocol}-{Path(argv[argv.index('--data') + 1]).stem if '--data' in argv else 'tiny'}.json"
    )
    return json.loads(written.read_text())


# ------------------------------------------------------------------------------------------------------------ measures


def test_knn_is_the_weighted_vote_of_the_nearest() -> None:
    """Three neighbours: one close of class 0, two farther off of class 1; the temperature decides."""
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6], [-1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 0])
    query, truth = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    # exp(1/t) against 2 exp(0.8/t): equal at t = 0.2 / ln 2 = 0.2885
    assert evaluate.knn(train, labels, query, truth, k=3, temperature=0.28) == 1
    assert evaluate.knn(train, labels, query, truth, k=3, temperature=0.30) == 0
    assert evaluate.knn(train, labels, query, truth, k=1, temperature=0.30) == 1
    assert evaluate.knn(train, labels, query, truth, k=99) == 1  # there are only four


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return float(probe.fit(train.numpy(), train_labels.numpy()).score(test.numpy(), test_labels.numpy()))


def test_logistic_regression_is_scikit_learns() -> None:
    """The same accuracy on classes that overlap, to within a few of 1,000 held-out points."""
    torch.manual_seed(0)
    labels = torch.arange(1300) % 4
    x = (0.4 * torch.randn(4, 20)[labels] + torch.randn(1300, 20)) * torch.logspace(-2, 2, 20)
    data = x[:300], labels[:300], x[300:], labels[300:]
    expected = linear_probe(*data)
    assert 0.4 < expected < 0.9
    assert evaluate.logistic_regression(*data) == pytest.approx(expected, abs=0.004)


def test_logistic_regression_takes_features_that_never_vary() -> None:
    x = torch.stack([torch.ones(40), torch.linspace(-1, 1, 40)], dim=1)
    labels = (x[:, 1] > 0).long()
    assert evaluate.logistic_regression(x, labels, x, labels) == 1


def test_stage_vectors_are_the_outlets_averaged_over_positions() -> None:
    backbone = Small().train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    x, labels = torch.randn(7, 3, 16, 16), torch.arange(7)
    batches = zip(x.split(3), labels.split(3), strict=True)
    vectors, found_labels = evaluate.stage_vectors(backbone, tuple(STAGES), batches, 7)
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert torch.equal(found_labels, labels)
    backbone.eval()
    for stage, found in zip(STAGES, vectors, strict=True):
        x = backbone.get_submodule(stage)(x)
        torch.testing.assert_close(found, x.mean((2, 3)))


# --------------------------------------------------------------------------------------------------------- linear_eval


def test_a_run_is_read_out_at_every_stage(finished: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As scikit-learn reads out the outlets of the saved weights."""
    results = linear(finished)
    printed = capsys.readouterr().out
    assert (results["protocol"], results["stages"], results["test"]) == ("fast", STAGES, 24)
    assert results["run"]["method"] == "loco"
    backbone = Small()
    backbone.load_state_dict(torch.load(finished / "backbone.pt"))
    data = images.load(f"npz:{tiny}")
    halves = []
    for part in ("train", "test"):
        batches = loading.plain_batches(data, part, 10, CPU)
        halves.append(evaluate.stage_vectors(backbone, tuple(STAGES), batches, 1)[0])
    for stage, accuracy, train, test in zip(STAGES, results["accuracy"], *halves, strict=True):
        expected = linear_probe(train, data.train_labels, test, data.test_labels)
        assert accuracy == pytest.approx(expected, abs=0.05)
        assert re.search(rf"{stage} +{100 * accuracy:.1f} ± ", printed)


def test_the_top_stage_can_be_read_out_alone(finished: Path) -> None:
    all_stages = linear(finished)
    results = linear(finished, "--no-per-stage")
    assert results["stages"] == ["layer4"]
    assert results["accuracy"] == all_stages["accuracy"][-1:]


def test_the_papers_protocol_learns_what_can_be_learnt(finished: Path) -> None:
    """Three colours: the classifiers get there from random crops and flips, by SGD without momentum."""
    results = linear(finished, "--protocol", "paper", "--epochs", "20", "--batch-size", "16")
    assert (results["protocol"], results["epochs"], results["lr"]) == ("paper", 20, 30)
    assert results["accuracy"][0] > 0.9


def test_the_papers_learning_rate_is_divided_by_ten_three_times(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, *args: Any) -> None:
            super().step(*args)
            (group,) = self.param_groups
            rates.append((group["lr"], group["momentum"], group["weight_decay"]))

    monkeypatch.setattr(torch.optim, "SGD", Watched)
    linear(finished, "--protocol", "paper", "--epochs", "10", "--batch-size", "48")
    lr = 30 * 48 / 256
    expected = [lr] * 3 + [lr / 10] * 3 + [lr / 100] * 3 + [lr / 1000]
    assert [rate for rate, _, _ in rates] == pytest.approx(expected)
    assert {(momentum, decay) for _, momentum, decay in rates} == {(0, 0)}


def test_the_papers_protocol_resumes_with_the_same_bits(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [finished, "--protocol", "paper", "--epochs", "3", "--batch-size", "16", "--lr", "1"]
    whole = linear(*argv)
    weights = torch.load(finished / "linear_eval-paper-tiny.pt")
    (finished / "linear_eval-paper-tiny.pt").unlink()

    save, epochs = linear_eval.Checkpoint.save, []

    def save_and_interrupt(self: Any, epoch: int, *parts: Any) -> None:
        save(self, epoch, *parts)
        epochs.append(epoch)
        if epochs == [1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(linear_eval.Checkpoint, "save", save_and_interrupt)
    assert linear_eval.main([*map(str, argv), "--device", "cpu", "--resume"]) == 130
    torch.rand(3)
    assert linear(*argv, "--resume") == whole
    assert epochs == [1, 2, 3]
    resumed = torch.load(finished / "linear_eval-paper-tiny.pt")
    assert all(torch.equal(resumed["parts"][0][name], value) for name, value in weights["parts"][0].items())


def test_a_read_out_of_other_settings_is_not_taken_up(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [finished, "--protocol", "paper", "--epochs", "1"]
    linear(*argv)
    torch.save(Small().state_dict(), finished / "backbone.pt")
    line = error_of(linear_eval, *argv, "--resume", capsys=capsys)
    assert re.search(
        r"linear_eval-paper-tiny.pt is of a read-out with other settings: delete it, or leave out --resume", line
    )


# ------------------------------------------------------------------------------------------------------------ knn_eval


def test_neighbours_vote_at_every_stage(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert knn_eval.main([str(finished), "--device", "cpu", "--k", "5", "200", "48"]) == 0
    results = json.loads((finished / "knn_eval-tiny.json").read_text())
    assert (results["stages"], results["k"], results["temperature"]) == (STAGES, [5, 48], 0.07)
    assert len(results["accuracy"]["5"]) == len(results["accuracy"]["48"]) == 4
    assert results["accuracy"]["5"][0] > 0.9
    printed = capsys.readouterr().out
    assert "k = 5, 48: there are 48 training images" in printed
    assert "k = 48, %" in printed
    assert "200" not in printed


def test_read_outs_on_other_data_by_other_protocols_and_of_other_checkpoints_lie_side_by_side(finished: Path) -> None:
    torch.save(torch.load(finished / "backbone.pt"), finished / "checkpoint-0007.pt")
    quick = ["--protocol", "paper", "--epochs", "1"]
    for argv in ([], ["--data", "digits"], quick, [*quick, "--data", "digits"]):
        assert linear_eval.main([str(finished), *argv, "--device", "cpu"]) == 0
    for script in (linear_eval, knn_eval):
        assert script.main([str(finished / "checkpoint-0007.pt"), "--device", "cpu"]) == 0
    names = {path.name for path in finished.glob("*_eval*.json*")}
    fast, papers = ({f"linear_eval-{p}-{data}.json" for data in ("tiny", "digits")} for p in ("fast", "paper"))
    of_checkpoint = {f"{measure}-tiny-checkpoint-0007.json" for measure in ("linear_eval-fast", "knn_eval")}
    assert names == fast | papers | of_checkpoint
    assert json.loads((finished / "knn_eval-tiny-checkpoint-0007.json").read_text())["checkpoint"] == "checkpoint-0007"


def test_older_results_are_kept(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = linear(finished)
    assert linear(finished) == results
    assert not list(finished.glob("*.json.*"))  # the same once more
    linear(finished, "--seed", "1")
    assert "kept the older results as" in capsys.readouterr().out
    linear(finished, "--seed", "2")
    seeds = [
        json.loads((finished / f"linear_eval-fast-tiny.json{end}").read_text())["seed"] for end in (".1", ".2", "")
    ]
    assert seeds == [0, 1, 2]


def test_the_tables_of_read_outs_fit_eighty_columns(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert knn_eval.main([str(finished), "--device", "cpu", "--k", "5", "20", "48"]) == 0
    printed = capsys.readouterr().out.replace(str(finished), "")
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
    assert all(f"k = {k}, %" in printed for k in (5, 20, 48))


def test_images_too_large_for_memory_are_read_out_from_their_files(
    finished: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = np.load(tiny)
    for part, folder in (("train", "train"), ("test", "val")):
        for i, (pixels, label) in enumerate(zip(arrays[f"x_{part}"], arrays[f"y_{part}"], strict=True)):
            (tmp_path / "photos" / folder / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "photos" / folder / str(label) / f"{i:02}.png")
    monkeypatch.setattr(image_folders, "MEMORY", 0)
    argv = [finished, "--data", tmp_path / "photos", "--batch-size", "16"]
    assert linear(*argv)["accuracy"][0] > 0.9
    assert linear(*argv, "--protocol", "paper", "--epochs", "20", "--workers", "1")["accuracy"][0] > 0.9
    assert knn_eval.main([*map(str, argv), "--device", "cpu"]) == 0


# ------------------------------------------------------------------------------------------ where encoders come from


def test_torchvisions_own_weights_are_read_out_with_imagenets_pixels(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    published, asked = resnet18(), []

    def made_on_the_spot(self: WeightsEnum, **options: Any) -> dict[str, Tensor]:
        asked.append((self, options))
        return published.state_dict()

    monkeypatch.setattr(WeightsEnum, "get_state_dict", made_on_the_spot)
    argv = ["--arch", "resnet18", "--weights", "DEFAULT", "--data", str(tiny), "--image-size", "32"]
    args = encoder_arguments(*argv, "--out", str(tmp_path / "out"))
    encoder, data = encoders.chosen(args)
    assert asked == [(ResNet18_Weights.DEFAULT, {"progress": True, "check_hash": True})]
    assert data.size == 32
    vectors, _ = encoders.vectors(args, encoder, data, "test")
    x = (data.test / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    published.fc = nn.Identity()
    torch.testing.assert_close(vectors[-1], published.eval()(x), atol=1e-4, rtol=1e-4)


def test_random_weights_follow_the_seed(tiny: Path, tmp_path: Path) -> None:
    argv = ["--arch", "small", "--random", "--data", str(tiny), "--image-size", "16", "--out", str(tmp_path / "out")]
    one, same, other = (
        encoders.chosen(encoder_arguments(*argv, "--seed", seed))[0].backbone.state_dict() for seed in ("1", "1", "2")
    )
    assert torch.equal(one["layer1.0.weight"], same["layer1.0.weight"])
    assert not torch.equal(one["layer1.0.weight"], other["layer1.0.weight"])
    assert linear(*argv)["encoder"] == "small-random-0"


def test_a_backbones_file_is_as_good_as_its_run(finished: Path) -> None:
    from_directory = linear(finished)
    (finished / "linear_eval-fast-tiny.json").unlink()
    assert linear_eval.main([str(finished / "backbone.pt"), "--device", "cpu"]) == 0
    assert json.loads((finished / "linear_eval-fast-tiny.json").read_text()) == from_directory


def test_another_data_set_can_be_read_out(finished: Path, tmp_path: Path) -> None:
    results = linear(finished, "--data", "digits", "--out", tmp_path / "elsewhere")
    assert (results["data"], results["image_size"], results["test"]) == ("digits", 16, 510)


# -------------------------------------------------------------------------------------------------------------- errors


def encoder_arguments(*argv: str) -> Any:
    return linear_eval.parser().parse_args([*argv, "--device", "cpu"])


def error_of(script: Any, *argv: Any, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a script ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        script.main([*map(str, argv), "--device", "cpu"])
    assert stopped.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


@pytest.mark.parametrize("script", [linear_eval, knn_eval], ids=["linear_eval", "knn_eval"])
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "nothing to read out: give a RUN, or --arch with --weights or --random"),
        ("--arch resnet18", "nothing to read out: give a RUN, or --arch with --weights or --random"),
        ("nowhere", "there is no nowhere"),
        ("empty", "empty is no run of pretrain.py: .*"),
        ("runs/loco --random", ".*runs/loco says itself what it is: leave out --arch, --weights and --random"),
        ("--arch resnet7 --random", "argument --arch: expected resnet18, .*, got 'resnet7'; did you mean .*"),
        ("--arch small --weights DEFAULT", "torchvision has no weights of small: .*"),
        (
            "--arch resnet18 --weights BEST",
            "there is no file BEST, and torchvision's weights of resnet18 are IMAGENET1K_V1, DEFAULT",
        ),
        ("--arch resnet18 --weights file", "file cannot be read as a file of weights"),
        ("--arch resnet18 --weights runs/loco/backbone.pt", ".*backbone.pt does not hold .* torchvision's resnet18"),
        ("--arch resnet18 --weights DEFAULT", r"DEFAULT of resnet18 cannot be downloaded \(<urlopen error no route>\)"),
        ("runs/loco --data mnist", "unknown data set 'mnist': choose .*"),
        ("--arch small --random --out file", "cannot read or write file: File exists"),
    ],
)
def test_a_wrong_argument_is_one_line(
    script: Any,
    argv: str,
    message: str,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_network(self: WeightsEnum, **options: Any) -> None:
        raise URLError("no route")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", no_network)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no weights")
    assert re.fullmatch(message, error_of(script, *argv.split(), capsys=capsys))


@pytest.mark.parametrize("script", [linear_eval, knn_eval], ids=["linear_eval", "knn_eval"])
def test_a_class_that_no_training_image_has_is_one_line(
    script: Any, finished: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = dict(np.load(tiny))
    np.savez(tmp_path / "odd.npz", **arrays | {"y_test": arrays["y_test"] + 6})
    line = error_of(script, finished, "--data", tmp_path / "odd.npz", capsys=capsys)
    assert line.startswith("odd: no training image has the label 6, 7, 8, as held-out ones do: give some to train on")


def test_help_ends_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for script in (linear_eval, knn_eval):
        with pytest.raises(SystemExit):
            script.main(["--help"])
        assert f"example: python examples/{script.__name__}.py " in " ".join(capsys.readouterr().out.split())


def test_weights_of_another_architecture_are_one_line(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(resnet18().state_dict(), finished / "backbone.pt")
    line = error_of(linear_eval, finished, capsys=capsys)
    assert re.search("holds weights of another architecture than small", line)


def test_a_learning_rate_of_nothing_is_one_line(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(linear_eval, finished, "--lr", "0", capsys=capsys)
    assert line == "argument --lr: expected a number above 0, got '0'"


def test_a_damaged_checkpoint_is_one_line(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "linear_eval-paper-tiny.pt").write_text("no checkpoint")
    line = error_of(linear_eval, finished, "--protocol", "paper", "--resume", capsys=capsys)
    assert re.search("linear_eval-paper-tiny.pt is no checkpoint of linear_eval.py: delete it", line)
