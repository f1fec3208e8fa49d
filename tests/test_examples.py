"""The examples: their data sets in every layout, their measures, a whole run, a killed one, and each error's line."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="the examples need the extra `examples`")
pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("tqdm")

from PIL import Image
from torch import Tensor, nn
from torchvision import datasets

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import evaluate  # noqa: E402
import images  # noqa: E402
import quickstart  # noqa: E402
import views  # noqa: E402
import wrap_your_own  # noqa: E402


@pytest.fixture(autouse=True)
def float32_on_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pixels(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Twelve by twelve grey images of three classes: a bright third, and noise."""
    arrays = {}
    for part, n in (("train", 24), ("test", 12)):
        labels = np.arange(n) % 3
        noisy = pixels(n, 12, 12) // 4
        for image, label in zip(noisy, labels, strict=True):
            image[4 * label : 4 * label + 4] += 160
        arrays |= {f"x_{part}": noisy, f"y_{part}": labels}
    np.savez(tmp_path / "tiny.npz", **arrays)
    return tmp_path / "tiny.npz"


def arguments(tiny: Path, out: Path, *more: str) -> list[str]:
    return ["--data", f"npz:{tiny}", "--epochs", "2", "--batch-size", "8", "--device", "cpu", "--out", str(out), *more]


# ------------------------------------------------------------------------------------------------------- data sets


def write_cifar(root: Path, folder: str, parts: dict[str, tuple[np.ndarray[Any, Any], list[int]]], key: str) -> None:
    (root / folder).mkdir()
    for name, (data, labels) in parts.items():
        rows = data.transpose(0, 3, 1, 2).reshape(len(data), -1)
        (root / folder / name).write_bytes(pickle.dumps({"data": rows, key: labels}))


def accept(monkeypatch: pytest.MonkeyPatch, dataset: type, folder: Path) -> None:
    """Put the md5 sums of the files made here in the place of the published ones."""

    def of(name: str) -> str:
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for files in ("train_list", "test_list"):
        present = [name for name, _ in getattr(dataset, files) if (folder / name).exists()]
        monkeypatch.setattr(dataset, files, [[name, of(name)] for name in present])
    if hasattr(dataset, "meta"):
        monkeypatch.setattr(dataset, "meta", dataset.meta | {"md5": of(dataset.meta["filename"])})


def make_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[int]]:
    x, y = pixels(10, 32, 32, 3), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    parts = {f"data_batch_{i + 1}": (x[2 * i : 2 * i + 2], y[2 * i : 2 * i + 2]) for i in range(5)}
    write_cifar(root, "cifar-10-batches-py", {**parts, "test_batch": (x[:3], y[:3])}, "labels")
    (root / "cifar-10-batches-py/batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    accept(monkeypatch, datasets.CIFAR10, root / "cifar-10-batches-py")
    return torch.from_numpy(x).permute(0, 3, 1, 2), y


def make_cifar100(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[int]]:
    x, y = pixels(6, 32, 32, 3), [0, 99, 3, 50, 7, 98]
    write_cifar(root, "cifar-100-python", {"train": (x, y), "test": (x[:3], y[:3])}, "fine_labels")
    (root / "cifar-100-python/meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    accept(monkeypatch, datasets.CIFAR100, root / "cifar-100-python")
    return torch.from_numpy(x).permute(0, 3, 1, 2), y


def make_fashion_mnist(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[int]]:
    x, y = pixels(5, 28, 28), [4, 3, 2, 1, 0]
    raw = root / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 5), ("t10k", 3)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, n, 28, 28) + x[:n].tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, n) + bytes(y[:n]))
    return torch.from_numpy(x).unsqueeze(1), y


def make_stl10(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[int]]:
    x, y = pixels(5, 3, 96, 96), [0, 9, 4, 1, 2]
    folder = root / "stl10_binary"
    folder.mkdir()
    for part, n in (("train", 5), ("test", 3)):
        (folder / f"{part}_X.bin").write_bytes(x[:n].transpose(0, 1, 3, 2).tobytes())  # column by column
        (folder / f"{part}_y.bin").write_bytes(bytes(label + 1 for label in y[:n]))
    for name in ("class_names.txt", "fold_indices.txt", "unlabeled_X.bin"):
        (folder / name).write_text("a\n")
    accept(monkeypatch, datasets.STL10, folder)
    return torch.from_numpy(x), y


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("cifar10", make_cifar10),
        ("cifar100", make_cifar100),
        ("fashion-mnist", make_fashion_mnist),
        ("stl10", make_stl10),
    ],
)
def test_torchvision_data_sets_come_as_they_were_written(
    name: str,
    make: Callable[[Path, pytest.MonkeyPatch], tuple[Tensor, list[int]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = make(tmp_path, monkeypatch)
    loaded = images.load(name, tmp_path)
    assert torch.equal(loaded.train, x)
    assert torch.equal(loaded.test, x[:3])
    assert loaded.train_labels.tolist() == y
    assert loaded.test_labels.tolist() == y[:3]
    assert images.load(name, tmp_path, size=20).train.shape == (len(x), x.shape[1], 20, 20)


def test_the_digits_are_scikit_learns_and_those_held_out_are_by_other_writers() -> None:
    digits = images.load("digits")
    original = images.load_digits()
    assert torch.equal(digits.train[:, 0], torch.from_numpy(original.images[:1287] * (255 / 16)).round().byte())
    assert (len(digits.train), len(digits.test), digits.classes, digits.channels, digits.size) == (1287, 510, 10, 1, 8)
    # each writer begins with 0 1 2 ... 9 0 1 2 ... 9
    assert digits.test_labels[:20].tolist() == [*range(10)] * 2
    assert images.load("digits", size=32).train.shape == (1287, 1, 32, 32)


def write_pngs(folder: Path, count: int, shade: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (20 + i, 30), (shade, shade, shade)).save(folder / f"{i}.png")


def test_image_folders_with_train_and_val_are_taken_as_they_are(tmp_path: Path) -> None:
    for part, count in (("train", 4), ("val", 2)):
        write_pngs(tmp_path / part / "dark", count, 10)
        write_pngs(tmp_path / part / "light", count, 200)
    loaded = images.load(f"imagefolder:{tmp_path}", size=16)
    assert loaded.train.shape == (8, 3, 16, 16)
    assert loaded.train.unique().tolist() == [10, 200]
    assert loaded.train_labels.tolist() == [0] * 4 + [1] * 4
    assert loaded.test_labels.tolist() == [0, 0, 1, 1]


def test_every_fifth_image_of_a_plain_folder_is_held_out(tmp_path: Path) -> None:
    write_pngs(tmp_path / "dark", 5, 10)
    write_pngs(tmp_path / "light", 10, 200)
    loaded = images.load(f"imagefolder:{tmp_path}")
    assert loaded.train.shape == (12, 3, 64, 64)
    assert loaded.test_labels.tolist() == [0, 1, 1]
    assert loaded.test.amax(dim=(1, 2, 3)).tolist() == [10, 200, 200]


def test_colour_arrays_have_their_channels_moved_first(tmp_path: Path) -> None:
    x = pixels(4, 10, 10, 3)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=[0, 1, 0, 1], x_test=x[:2], y_test=[0, 1])
    assert torch.equal(images.load(f"npz:{tmp_path / 'a.npz'}").train, torch.from_numpy(x).permute(0, 3, 1, 2))


# ------------------------------------------------------------------------------------------------- views, evaluation


@pytest.mark.parametrize("make", [views.grey_views, views.colour_views(8)], ids=["grey", "colour"])
def test_each_image_of_a_batch_gets_a_view_of_its_own(make: views.Views) -> None:
    channels = 1 if make is views.grey_views else 3
    batch = torch.from_numpy(pixels(1, channels, 8, 8)).expand(6, -1, -1, -1)
    torch.manual_seed(0)
    seen = make(batch)
    assert seen.shape == batch.shape
    assert seen.dtype == torch.float32
    assert -1 <= seen.min() < seen.max() <= 1
    assert len({tuple(view.flatten().tolist()) for view in seen}) == 6
    torch.manual_seed(0)
    assert torch.equal(make(batch), seen)


def test_only_views_that_may_flip_do() -> None:
    lit_left = torch.zeros(400, 1, 8, 8, dtype=torch.uint8)
    lit_left[..., :4] = 255
    torch.manual_seed(0)

    def balance(seen: Tensor) -> float:
        return float((seen[..., :4] - seen[..., 4:]).mean())

    assert balance(views.grey_views(lit_left)) > 1
    assert abs(balance(views.grey_views(lit_left, flip=True))) < 0.3


def test_the_grey_views_change_the_picture_by_what_they_say() -> None:
    """Moved by at most 12 % of its side and enlarged by at most 1.15, a dot in the middle stays near it."""
    dot = torch.zeros(200, 1, 41, 41, dtype=torch.uint8)
    dot[..., 19:22, 19:22] = 255
    torch.manual_seed(0)
    place = (views.grey_views(dot).squeeze(1) > 0).nonzero()[:, 1:].float() - 20
    assert 3 < place.abs().max() < 41 * 0.12 * 1.5 + 3


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


def test_the_probe_reads_what_is_linear_and_nothing_else() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 2)
    side, quadrant = (x[:, 0] > 0).long(), (x[:, 0] * x[:, 1] > 0).long()
    scaled = x * torch.tensor([1e-3, 1e3]) + 5
    assert evaluate.linear_probe(scaled[:100], side[:100], scaled[100:], side[100:]) > 0.95
    assert evaluate.linear_probe(scaled[:100], quadrant[:100], scaled[100:], quadrant[100:]) < 0.7


def test_features_are_those_of_eval_mode_and_leave_the_backbone_as_it_was() -> None:
    backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1))
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    x = torch.from_numpy(pixels(7, 1, 8, 8))
    found = evaluate.features(backbone, x, batch_size=3)
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    expected = backbone.eval()(x / 127.5 - 1).flatten(1)
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------------------------------------- the quickstart


def test_all_methods_start_from_the_same_weights_of_backbone_and_decoders(tiny: Path) -> None:
    args = argparse.Namespace(seed=3, device=torch.device("cpu"), overlap=2)
    simclr, gim, loco, supervised = quickstart.new_methods(args, images.load(f"npz:{tiny}"), steps=5)
    for method in (gim, loco, supervised):
        for name, value in method.model.backbone.state_dict().items():
            assert torch.equal(value, simclr.model.backbone.state_dict()[name]), name
    starts = {decoder.channels: decoder.state_dict() for decoder in gim.model.decoders}
    for decoder in [*simclr.model.decoders, *loco.model.decoders]:
        for name, value in decoder.state_dict().items():
            assert torch.equal(value, starts[decoder.channels][name]), name
    assert [len(m.model.plan.units) for m in (simclr, gim, loco, supervised)] == [1, 6, 4, 1]


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    table = [{name: value for name, value in row.items() if name != "ms_per_step"} for row in results["table"]]
    return {**results, "table": table}


def same(one: Any, other: Any) -> bool:
    """Bit by bit, through lists and dicts; the times that steps took excepted."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one if key != "seconds")
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def test_a_run_ends_with_a_table_results_and_a_picture(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep/er"
    assert quickstart.main(arguments(tiny, out)) == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    rows = {row["method"]: row for row in results["table"]}
    assert list(rows) == ["random start", "SimCLR", "Greedy InfoMax", "LoCo", "supervised"]
    assert [row["units"] for row in rows.values()] == [None, 1, 6, 5, 1]
    flops = [rows[name]["step_flops_relative"] for name in ("Greedy InfoMax", "SimCLR", "LoCo")]
    assert flops[0] < flops[1] == 1 < flops[2] < 1.25
    for row in rows.values():
        assert 0 <= row["probe_accuracy"] <= 1
        accuracy = f"{100 * row['probe_accuracy']:.1f}"
        assert re.search(rf"{row['method']} .* {re.escape(accuracy)} ± ", printed), (row, printed)
    assert np.array(results["losses"]["LoCo"]).shape == (2, 5)  # (epochs, units)
    assert results["units"]["LoCo"] == [[k, k + 1] for k in range(5)]
    with Image.open(out / "quickstart.png") as picture:
        assert min(picture.size) > 800
        assert len(set(picture.convert("L").resize((200, 120)).tobytes())) > 100  # something is drawn
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "quickstart.png", "results.json"]


def test_a_run_that_was_interrupted_ends_with_the_same_bits(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    quickstart.main(arguments(tiny, whole))

    save = quickstart.save

    def save_and_interrupt(*args: Any) -> None:
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quickstart, "save", save_and_interrupt)
        capsys.readouterr()
        assert quickstart.main(arguments(tiny, broken)) == 130
    again = capsys.readouterr().err.strip().splitlines()[-1]
    assert again.endswith(f"python examples/quickstart.py {' '.join(arguments(tiny, broken))} --resume")
    assert torch.load(broken / "checkpoint.pt")["epoch"] == 1

    torch.rand(7)  # the state of the random numbers is another one by then
    assert quickstart.main(arguments(tiny, broken, "--resume")) == 0
    assert same(torch.load(broken / "checkpoint.pt"), torch.load(whole / "checkpoint.pt"))
    one, other = (json.loads((out / "results.json").read_text()) for out in (whole, broken))
    assert without_times(one) == without_times(other)


def test_a_script_that_was_killed_ends_with_the_same_bits(tiny: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    script = [sys.executable, str(ROOT / "examples/quickstart.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    long = ("--epochs", "6")
    process = subprocess.Popen(
        [*script, *arguments(tiny, killed, *long)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (killed / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < torch.load(killed / "checkpoint.pt")["epoch"] < 6

    quickstart.main(arguments(tiny, killed, *long, "--resume"))
    quickstart.main(arguments(tiny, whole, *long))
    assert same(torch.load(killed / "checkpoint.pt"), torch.load(whole / "checkpoint.pt"))


def test_an_interrupt_before_the_first_checkpoint_says_that_nothing_is_saved(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "save", interrupt)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/checkpoint.pt").write_text("of an older run")
    assert quickstart.main(arguments(tiny, tmp_path / "out")) == 130
    assert capsys.readouterr().err.endswith("\nstopped; no epoch was finished, nothing is saved\n")


# -------------------------------------------------------------------------------------------------------------- errors


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a run ends with."""
    with pytest.raises(SystemExit) as stopped:
        quickstart.main(argv)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--data mnist", "unknown data set 'mnist': choose digits, cifar10, .*"),
        ("--data imagefolder:", "unknown data set 'imagefolder:': choose .*"),
        ("--data imagefolder:nowhere", "there is no directory nowhere"),
        ("--data imagefolder:empty", "empty is no folder of images: Couldn't find any class folder in empty.*"),
        ("--data npz:nowhere.npz", "nowhere.npz cannot be read as an .npz file .*No such file.*"),
        ("--data npz:file", "file cannot be read as an .npz file .*"),
        ("--data cifar10 --data-dir nowhere", r"there is no directory nowhere \(--data-dir\) .* --download makes it"),
        (
            "--data cifar10 --data-dir empty",
            r"cifar10 cannot be read from empty \(Dataset not found.*\); add --download.*",
        ),
        ("--data cifar100 --data-dir empty", r"cifar100 cannot be read from empty \(Dataset not found.*\); add .*"),
        ("--data stl10 --data-dir empty", r"stl10 cannot be read from empty \(Dataset not found.*\); add --download.*"),
        ("--data fashion-mnist --data-dir empty", r"fashion-mnist cannot be read from empty \(.*\); add --download.*"),
        ("--download", "--download is for cifar10, .*; digits has nothing to download"),
        ("--overlap 6", "--overlap is between 0 and 5 for 6 stages, got 6"),
        ("--overlap -1", "--overlap is between 0 and 5 for 6 stages, got -1"),
        ("--overlap one", "argument --overlap: invalid int value: 'one'"),
        ("--batch-size 1288", "--batch-size 1288 is larger than the 1287 images of digits"),
        ("--batch-size 1", "argument --batch-size: expected a whole number from 2 up, got '1'"),
        ("--epochs 0", "argument --epochs: expected a whole number from 1 up, got '0'"),
        ("--epochs 1.5", "argument --epochs: expected a whole number from 1 up, got '1.5'"),
        ("--seed -1", "argument --seed: expected a whole number from 0 up, got '-1'"),
        ("--device abacus", "argument --device: 'abacus' is no device of this machine"),
        ("--out file", "cannot write to file: File exists"),
        ("--out file/below", "cannot write to file/below: Not a directory"),
        ("--resume --out empty", "there is nothing to resume: empty/checkpoint.pt does not exist"),
        ("--resume --out strange", "strange/checkpoint.pt is not a checkpoint of this example"),
        ("--wings 2", "unrecognized arguments: --wings 2"),
    ],
)
def test_a_wrong_argument_is_one_line(
    argv: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "strange"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").write_text("no archive")
    (tmp_path / "strange/checkpoint.pt").write_text("no checkpoint")
    out = [] if "--out" in argv else ["--out", "out"]
    assert re.fullmatch(message, error_of([*argv.split(), *out], capsys))


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    x, y = pixels(4, 8, 8), np.array([0, 1, 0, 1])

    def refusal(**arrays: Any) -> str:
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(images.DataError) as refused:
            images.load(f"npz:{tmp_path / 'a.npz'}")
        return str(refused.value)

    assert "lacks y_train, y_test" in refusal(x_train=x, x_test=x)
    assert "x_train must be uint8 (N, H, W, C), not float64" in refusal(x_train=x / 255, y_train=y, x_test=x, y_test=y)
    assert "4 train images and 3 labels" in refusal(x_train=x, y_train=y[:3], x_test=x, y_test=y)
    assert "0 test images" in refusal(x_train=x, y_train=y, x_test=x[:0], y_test=y[:0])
    assert "count from 0; the least is -1" in refusal(x_train=x, y_train=y - 1, x_test=x, y_test=y)
    assert "test has 3" in refusal(x_train=x, y_train=y, x_test=pixels(4, 8, 8, 3), y_test=y)


def test_a_download_that_fails_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(dataset: datasets.CIFAR10) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", no_network)
    line = error_of(["--data", "cifar10", "--data-dir", str(tmp_path / "new"), "--download"], capsys)
    assert re.fullmatch(r"cifar10 cannot be read from .*new \(<urlopen error no route to host>\)", line)


def test_a_damaged_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_fashion_mnist(tmp_path, monkeypatch)
    path = tmp_path / "FashionMNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(images.DataError, match="fashion-mnist cannot be read from"):
        images.load("fashion-mnist", tmp_path)


def test_a_checkpoint_of_other_settings_is_not_taken_up(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quickstart.main(arguments(tiny, tmp_path / "out", "--epochs", "1"))
    capsys.readouterr()
    line = error_of(arguments(tiny, tmp_path / "out", "--seed", "1", "--resume"), capsys)
    assert re.fullmatch(r".*checkpoint.pt is of a run with other settings: resume it with --epochs 1 --seed 0", line)


# ------------------------------------------------------------------------------------------------------- wrap_your_own


def test_wrap_your_own_trains_and_leaves_plain_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrap_your_own.main(epochs=2, path=tmp_path / "new/backbone.pt")
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"unit \d (\d\.\d\d)", printed)]
    assert len(losses) == 4
    assert losses[2] < losses[0]
    assert losses[3] < losses[1]
    assert float(re.search(r"linear probe: (\d+\.\d)%", printed)[1]) > 50
    assert torch.load(tmp_path / "new/backbone.pt").keys() == wrap_your_own.Backbone().state_dict().keys()


def test_wrap_your_own_is_short() -> None:
    assert len((ROOT / "examples/wrap_your_own.py").read_text().splitlines()) < 60
