"""The quickstart and wrap_your_own: a whole run, a killed one, and each error's line."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
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

import quickstart
import wrap_your_own
from inputs import images
from PIL import Image
from torch import Tensor
from torchvision import datasets

ROOT = Path(__file__).parents[2]


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


def test_images_too_large_for_memory_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        (tmp_path / part / "dark").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / part / "dark/0.png")
    line = error_of(["--data", "imagenet", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")], capsys)
    assert re.fullmatch("imagenet is too large for the quickstart's memory: take a smaller one, or --image-size", line)


def test_a_download_that_fails_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(dataset: datasets.CIFAR10) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", no_network)
    line = error_of(["--data", "cifar10", "--data-dir", str(tmp_path / "new"), "--download"], capsys)
    assert re.fullmatch(r"cifar10 cannot be read from .*new \(<urlopen error no route to host>\)", line)


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
