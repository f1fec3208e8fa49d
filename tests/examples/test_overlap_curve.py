"""examples/overlap_curve.py: runs that share everything but their plan, resumed to the bit, and what is made of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib", reason="the examples need the extra `examples`")
pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("tqdm")

import backbones
import overlap_curve
from curves import claims, costs, network, presets, results
from curves.presets import BOTH, START, Curve, Setting
from inputs.images import load
from inputs.loading import plain_batches
from inputs.views import scaled
from PIL import Image
from pretraining import runs
from pretraining.training import Training

from locallearn import MLPDecoder, Plan, UpperOnly
from locallearn._walk import segment
from locallearn.memory import measure

ROOT = Path(__file__).parents[2]
SETTING = Setting("supervised", "resnet8", stages=3, images=40, held_out=12, epochs=2, batch_size=8)
CURVES = (
    Curve("labels", SETTING, (START, "0", "2", BOTH), (0, 1)),
    Curve("views", replace(SETTING, task="contrastive", decoder="conv"), ("1",), (0,)),
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two curves of a network of three blocks, in single precision on one thread."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(backbones.CIFAR_DEPTHS, "resnet8", 8)
    eight = backbones.Architecture(partial(backbones._resnet_cifar, depth=8), backbones.RESNET[:3])
    monkeypatch.setitem(backbones.ARCHITECTURES, "resnet8", eight)
    monkeypatch.setitem(presets.PRESETS, "cpu", CURVES)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Images of 16 pixels and three classes: a third that is a little brighter, and noise."""
    random, arrays = np.random.default_rng(0), {}
    for part, n in (("train", 48), ("test", 15)):
        labels = np.arange(n) % 3
        pixels = random.integers(0, 220, (n, 16, 16, 3), dtype=np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            image[5 * label : 5 * label + 5] += 12
        arrays |= {f"x_{part}": pixels, f"y_{part}": labels}
    np.savez(tmp_path / "tiny.npz", **arrays)
    return tmp_path / "tiny.npz"


def arguments(tiny: Path, out: Path, *more: str) -> list[str]:
    return ["--data", str(tiny), "--device", "cpu", "--out", str(out), *more]


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("seconds", "ms_per_step")}


def line(row: str, seed: int, accuracy: float, peak: int = 100, curve: str = "labels") -> dict[str, Any]:
    """What a finished run says, as far as tables and figures read it."""
    about = {"arch": "resnet8", "task": "supervised", "decoder": "mlp", "data": "tiny", "images": 40, "held_out": 12}
    counts = {"epochs": 2, "batch_size": 8, "flops": 7_000_000_000, "peak_bytes": peak * 1_000_000}
    memory = {"peak_bytes_per_image": 2e6, "peak_bytes_recomputed": peak * 500_000}
    names = {"stages": ["layer1.0", "layer2.0", "layer3.0"], "units": [[0, 0]] * 3}
    return {"curve": curve, "row": row, "seed": seed, "accuracy": accuracy} | about | counts | memory | names


# --------------------------------------------------------------------------------------------------------- whole runs


def test_a_grid_ends_with_a_line_per_run_a_table_and_a_figure(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert overlap_curve.main(arguments(tiny, out, "--commit", "abc")) == 0
    lines = lines_of(out)
    asked = [(job.curve, job.row, job.seed) for job in presets.jobs(CURVES)]
    assert sorted((one["curve"], one["row"], one["seed"]) for one in lines) == sorted(asked)
    both = next(one for one in lines if one["row"] == BOTH)
    assert both["units"] == [[0, 0], [0, 1], [1, 1], [1, 2], [2, 2]]
    assert both["stages"] == ["layer1.0", "layer2.0", "layer3.0"]
    assert len(both["stages_accuracy"]) == 3
    assert both["accuracy"] == both["stages_accuracy"][-1]
    assert len(both["losses"]) == len(both["units_accuracy"]) == 5
    assert (both["commit"], both["images"], both["held_out"], both["image_size"]) == ("abc", 40, 12, 16)
    assert {"locallearn", "torch", "python"} == both["versions"].keys()
    for one in lines:
        assert 0 <= one["accuracy"] <= 1
        assert (one["losses"] is None) == (one["row"] == START)
        assert (one["units_accuracy"] is None) == (one["task"] == "contrastive")
    assert runs.read_settings(out / "labels/0/seed-0")["arch"] == "resnet8"  # linear_eval.py and others read it
    printed, table = capsys.readouterr().out, (out / "overlap_curve.md").read_text()
    greedy = next(row for row in table.splitlines() if row.startswith("| 0 (greedy)"))
    assert all(cell.strip() in printed for cell in greedy.split("|"))
    with Image.open(out / "overlap_curve.png") as picture:
        assert len(set(picture.convert("L").resize((200, 120)).tobytes())) > 50  # something is drawn


def test_a_run_stopped_in_the_middle_of_an_epoch_ends_with_the_same_bits(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    one = ("--curves", "views")
    assert overlap_curve.main(arguments(tiny, whole, *one)) == 0

    update = Training.update

    def update_and_be_told_to_stop(training: Training) -> float:
        lr = update(training)
        if training.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return lr

    with monkeypatch.context() as patch:
        patch.setattr(Training, "update", update_and_be_told_to_stop)
        assert overlap_curve.main(arguments(tiny, broken, *one)) == 130
    assert "the same command goes on" in capsys.readouterr().err
    directory = "views/1/seed-0"
    assert runs.newest_checkpoint(broken / directory)["step"] == 7  # type: ignore[index]

    torch.rand(5)  # the state of the random numbers is another one by then
    assert overlap_curve.main(arguments(tiny, broken, *one)) == 0
    ours, theirs = (runs.newest_checkpoint(out / directory) for out in (broken, whole))
    assert ours is not None
    assert theirs is not None
    assert ours["step"] == theirs["step"] == 10
    for name, weight in theirs["backbone"].items():
        assert torch.equal(ours["backbone"][name], weight), name
    assert without_times(lines_of(broken)[0]) == without_times(lines_of(whole)[0])


def test_a_script_that_was_killed_goes_on_to_the_same_bits(tiny: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    size = ("--images", "48", "--held-out", "12", "--batch-size", "4", "--epochs", "3", "--threads", "1")
    one = ("--curves", "supervised-4", "--rows", "1", "--seeds", "0", *size)

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "examples/overlap_curve.py", *arguments(tiny, out, *one)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    process = start(killed)
    deadline = time.monotonic() + 120
    while not list(killed.glob("supervised-4/1/seed-0/checkpoint-*.pt")):
        assert process.poll() is None, "it ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "results.jsonl").exists()
    assert start(killed).wait() == start(whole).wait() == 0
    assert without_times(lines_of(killed)[0]) == without_times(lines_of(whole)[0])


def test_what_is_finished_is_not_run_again_and_other_settings_are_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = arguments(tiny, tmp_path / "out", "--curves", "labels", "--rows", "0", "--seeds", "0")
    assert overlap_curve.main(one) == 0
    with monkeypatch.context() as patch:
        patch.setattr(overlap_curve, "train", None)  # it would be called
        assert overlap_curve.main(one) == 0
    with pytest.raises(SystemExit):
        overlap_curve.main([*one, "--epochs", "3"])
    assert "holds a run with other settings: epochs 2, not 3" in capsys.readouterr().err


def test_several_jobs_are_the_same_command_several_times(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    class Finished:
        returncode = 0

        def __init__(self, command: list[str]) -> None:
            started.append(command)

        def poll(self) -> int:
            return 0

    monkeypatch.setattr(overlap_curve.subprocess, "Popen", Finished)
    argv = arguments(tiny, tmp_path, "--jobs", "3")
    assert overlap_curve.main(argv) == 0
    assert [command[2:] for command in started] == [[*argv, "--jobs", "1"]] * 3


def test_a_run_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    with claims.claimed(tmp_path / "run") as mine:
        assert mine
        with claims.claimed(tmp_path / "run") as theirs, claims.claimed(tmp_path / "other") as free:
            assert not theirs
            assert free
    with claims.claimed(tmp_path / "run") as again:
        assert again


# ------------------------------------------------------------------------------------------------- what all rows share


def test_all_rows_start_from_the_same_weights_of_backbone_and_decoders(tiny: Path) -> None:
    images = load(str(tiny))
    first, *others = [
        network.new_training(presets.Job("labels", SETTING, row, 3), images, 10, torch.device("cpu")).model
        for row in ("0", "1", "2", BOTH)
    ]
    starts = {decoder.channels: decoder.state_dict() for decoder in first.decoders}
    decoders = {str(model.plan): model.decoders for model in others}[str(Plan.hierarchical(3))]
    first_of_two, second = decoders[1].state_dict(), decoders[2].state_dict()  # both read stage 1
    assert not any(torch.equal(first_of_two[name], second[name]) for name in second)
    for model in others:
        for name, value in model.backbone.state_dict().items():
            assert torch.equal(value, first.backbone.state_dict()[name]), name
        ends = [unit.last for unit in model.plan.units]
        for decoder in [decoder for k, decoder in enumerate(model.decoders) if ends[k] not in ends[:k]]:
            for name, value in decoder.state_dict().items():
                assert torch.equal(value, starts[decoder.channels][name]), name


def test_a_units_own_accuracy_is_that_of_its_decoder_on_the_outlet_it_reads(tiny: Path) -> None:
    images = load(str(tiny))
    images = replace(
        images, test=images.train, test_labels=images.train_labels
    )  # what it knows, so that it is not guessing
    training = network.new_training(presets.Job("labels", SETTING, "1", 0), images, 60, torch.device("cpu"))
    model = training.model
    for _ in range(40):
        model.local_step(scaled(images.train), targets=images.train_labels)
        training.update()
    ours = overlap_curve.own_accuracies(model, images)
    assert max(ours) > 1 / 2  # by guessing a third
    assert model.training
    model.eval()
    (pixels, labels), *none = plain_batches(images, "test", 512, torch.device("cpu"))
    assert not none
    backbone = model.backbone
    maps = backbone.layer2(backbone.layer1(backbone.relu(backbone.bn1(backbone.conv1(pixels)))))
    for accuracy, decoder, outlet in zip(ours, model.decoders, (maps, backbone.layer3(maps)), strict=True):
        assert accuracy == pytest.approx((decoder(outlet).argmax(1) == labels).double().mean().item())


def test_end_to_end_by_the_wrapper_costs_what_plain_backpropagation_does() -> None:
    backbone, decoder = SETTING.backbone(16), MLPDecoder(64, out_features=10)
    for weight in [*backbone.parameters(), *decoder.parameters()]:
        weight.grad = torch.zeros_like(weight)
    images, labels = torch.zeros(8, 3, 16, 16), torch.zeros(8, dtype=torch.long)

    def step() -> None:
        maps = backbone.relu(backbone.bn1(backbone.conv1(images)))
        maps = backbone.layer3(backbone.layer2(backbone.layer1(maps)))
        F.cross_entropy(decoder(maps), labels).backward()

    plain, ours = measure(step), costs.counted(SETTING, "2", 16, 8)
    assert ours.peak_bytes == pytest.approx(plain.peak_bytes, rel=0.02, abs=segment.SMALL)  # may live a little longer
    assert ours.flops == plain.flops + 2 * 8 * 64 * 10  # the network's own classifier runs, and is not trained


def test_memory_grows_with_the_overlap_and_falls_with_recomputation() -> None:
    setting = replace(SETTING, arch="resnet20", stages=9)
    peaks = [costs.counted(setting, row, 32, 8).peak_bytes for row in ("0", "1", "2", "8")]
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[-1] / 2
    assert costs.counted(setting, "8", 32, 8, recompute=True).peak_bytes < peaks[-1]


EVERY = [curve for name, preset in presets.PRESETS.items() for curve in preset]


@pytest.mark.parametrize("curve", EVERY, ids=lambda curve: curve.name)
def test_curves_of_the_presets_are_cut_into_as_many_stages_as_their_plans_have(curve: Curve) -> None:
    assert len(curve.setting.names) == curve.setting.stages
    plans = [presets.plan_of(row, curve.setting.stages) for row in curve.rows if row not in presets.SHARINGS]
    assert all(plan.stages == curve.setting.stages for plan in plans)
    assert (curve.seeds == (presets.PILOT,)) == curve.name.startswith("pilot-")
    backbone = curve.setting.backbone(32)
    assert all(backbone.get_submodule(name) is not None for name in curve.setting.names)


def test_rows_that_are_no_overlap() -> None:
    assert presets.plan_of(BOTH, 4) == Plan.hierarchical(4)
    assert presets.plan_of("2", 4) == Plan.windows(4, 2)
    assert presets.plan_of("upper", 4) == UpperOnly().plan(4, 1)
    assert presets.plan_of("deep", 4) == Plan.deep_supervision(4)
    with pytest.raises(ValueError, match="resnet18 has 4 stages here; got stages=5"):
        _ = replace(SETTING, arch="resnet18", stages=5).names


def test_the_ways_to_share_of_table_5_are_those_of_the_other_scripts() -> None:
    setting = replace(presets.VIEWS, arch="presnet_small-3", decoder="mlp")
    soft, first = (
        network.wrapped(setting, row, setting.backbone(8), 8, classes=3) for row in (presets.SOFT, presets.FIRST)
    )
    assert [unit.last for unit in soft.plan.units] == list(range(6))
    assert soft.penalty is None  # of a step that has not been taken
    soft.local_step(*torch.rand(2, 4, 3, 8, 8))
    assert soft.penalty is not None
    assert len(first.plan.units) == 6
    assert first.plan.stages == 11  # the first stage, and two parts of each other
    peaks = {row: costs.counted(setting, row, 8, 4).peak_bytes for row in ("0", presets.FIRST, "1")}
    assert peaks["0"] < peaks[presets.FIRST] < peaks["1"]


# --------------------------------------------------------------------------------------------------- tables and figures


def test_a_difference_is_taken_seed_by_seed() -> None:
    runs_of = [line("0", seed, accuracy) for seed, accuracy in ((0, 0.40), (1, 0.50), (2, 0.45), (3, 0.90))]
    runs_of += [line("1", seed, accuracy) for seed, accuracy in ((0, 0.42), (1, 0.53), (2, 0.46))]
    greedy, one = results.points(runs_of)["labels"]
    more, half = results.difference(one, greedy)  # type: ignore[misc]
    assert more == pytest.approx(2.0)  # of 2, 3 and 1
    assert half == pytest.approx(4.302653 * 1 / 3**0.5, rel=1e-5)  # t(2), standard deviation 1
    (alone,) = results.points(runs_of[:1])["labels"]
    assert results.difference(one, alone) == (pytest.approx(2.0), None)
    (other,) = results.points([line("0", 9, 0.4)])["labels"]
    assert results.difference(one, other) is None


def test_what_was_not_run_stays_empty_in_the_table() -> None:
    table = results.markdown(
        [line("0", 0, 0.4), line("0", 1, 0.5), line("2", 0, 0.6, 150), line(START, 0, 0.2), line(BOTH, 1, 0.55, 120)]
    )
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines() if row.startswith("| ")]
    assert [row[0] for row in rows] == ["overlap", "random start", "0 (greedy)", "2 (end to end)", "0 and 1 together"]
    header, _, greedy, whole, both = rows
    assert header[2:4] == ["seed 0", "seed 1"]
    assert greedy[2:5] == ["40.0", "50.0", "45.0 ± 7.1"]
    assert whole[2:6] == ["60.0", "", "60.0", "+20.0"]
    assert both[2:6] == ["", "55.0", "55.0", "+5.0"]
    assert (greedy[6], greedy[8], whole[8]) == ("100", "33", "8")  # (150 - 100) / 2 images more than a batch of 8


def test_curves_stand_in_the_presets_order_and_pilots_last() -> None:
    names = ["pilot-1", "views", "another", "labels"]
    assert list(results.points([line("0", 0, 0.4, curve=name) for name in names])) == [
        *("labels", "views", "another", "pilot-1")
    ]


def test_times_are_measured_row_by_row_and_stand_in_the_table_beside_results(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert overlap_curve.main(arguments(tiny, tmp_path, "--times", "2", "--curves", "labels")) == 0
    times = [json.loads(text) for text in (tmp_path / "times.jsonl").read_text().splitlines()]
    assert [(one["curve"], one["row"], one["steps"]) for one in times] == [
        ("labels", row, 2) for row in ("0", "2", BOTH)
    ]
    assert all(one["step_ms"] > 0 for one in times)
    assert f"labels/0: {times[0]['step_ms']:.0f} ms" in capsys.readouterr().out
    table = results.markdown([line("0", 0, 0.4), line("1", 0, 0.4), {"curve": "labels", "row": "1", "step_ms": 41.6}])
    assert [row.split("|")[-2].strip() for row in table.splitlines() if row.startswith("| ")] == ["ms", "", "42"]


def test_the_report_needs_nothing_but_lines_of_results(tmp_path: Path) -> None:
    found = [line(row, seed, 0.3 + 0.1 * seed) for row in ("0", "1", "2", "upper", "deep") for seed in (0, 1)]
    found += [line("0", 0, 0.2, curve="one"), line("0", 0, 0.2, curve="alone")]
    files = [tmp_path / "some.jsonl", tmp_path / "others.jsonl"]
    for path, part in zip(files, (found[:3], found[3:]), strict=True):
        path.write_text("".join(json.dumps(one) + "\n" for one in part))
    assert overlap_curve.main(["--report", *map(str, files), "--out", str(tmp_path / "page")]) == 0
    assert "| 1 |" in (tmp_path / "page/overlap_curve.md").read_text()
    only = ["--report", *map(str, files), "--curves", "one", "alone", "--out", str(tmp_path / "page")]
    assert overlap_curve.main(only) == 0
    assert "| 1 |" not in (tmp_path / "page/overlap_curve.md").read_text()
    assert (tmp_path / "page/overlap_curve.png").stat().st_size > 10_000


def test_a_narrow_report_drops_columns_and_their_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [line(row, seed, 0.7 + 0.01 * seed, 10_000) for row in ("0", "1", "2") for seed in (0, 1)]
    found += [{"curve": "labels", "row": row, "step_ms": 1234.5} for row in ("0", "1", "2")]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))

    def printed(columns: str) -> str:
        monkeypatch.setenv("COLUMNS", columns)
        assert overlap_curve.main(["--report", str(tmp_path / "results.jsonl")]) == 0
        return capsys.readouterr().out.split("wrote")[0]

    wide, narrow = printed("160"), printed("80")
    assert "GFLOP and ms: of a step" in " ".join(wide.split())
    assert "1234" in wide
    assert max(map(len, narrow.splitlines())) <= 80
    assert not [word for word in ("…", "1234", "GFLOP", "Largest", " ms") if word in narrow]
    assert "overlap_curve.md has every column" in " ".join(narrow.split())


def test_names_that_are_not_there_are_told_with_each_that_is_once() -> None:
    overlap_curve.all_there(None, [], "it has no")
    overlap_curve.all_there(["a"], ["a", "b"], "it has no")
    with pytest.raises(overlap_curve.DataError, match=r"^nobody has c, d; it has a, b$"):
        overlap_curve.all_there(["c", "a", "d", "c"], ["a", "b", "a"], "nobody has")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--curves", "nonsense"], "--preset cpu has no curve nonsense; it has labels, views"),
        (["--batch-size", "41", "--curves", "views"], "tiny has 40 images to train on: too few for a batch of 41"),
        (["--curves", "nonsense", "--data", "nowhere.npz"], "--preset cpu has no curve nonsense; it has labels, views"),
        (["--rows", "99"], "--preset cpu has no row 99; it has start, 0, 2, both, 1"),
        (["--curves", "views", "--rows", "1", "0"], "--curves views has no row 0; it has 1"),
        (["--report", "no.jsonl"], "there is no file no.jsonl: --report takes a grid's results.jsonl"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tiny: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        overlap_curve.main(arguments(tiny, tmp_path / "out", *more))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
