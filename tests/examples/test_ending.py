"""One place decides how a script ends: what can be foreseen is one line and a status, and no script goes round it."""

from __future__ import annotations

import errno
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the examples need the extra `examples`")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import stoppable

from command_line import Parser, at_least, number_from, status_of
from inputs.image_sets import DataError

from locallearn.diagnosis import DivergedError

EXAMPLES = Path(__file__).parents[2] / "examples"
TOO_LARGE = 2**55  # numbers


def allocate_too_much() -> None:
    torch.empty(TOO_LARGE, dtype=torch.uint8)


def raises(problem: BaseException) -> Callable[[], None]:
    def step() -> None:
        raise problem

    return step


def ended(step: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """The status, and what stands on stderr."""
    arguments = Parser()
    arguments.add_argument("--batch-size", type=at_least(1), default=8)
    arguments.add_argument("--out", type=Path, default=Path("runs"))
    try:
        status: object = status_of(arguments, lambda args: step(), [], "stopped; go on")
    except SystemExit as stopped:
        status = stopped.code
    return status, capsys.readouterr().err


CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB is free. "
    "See documentation for Memory Management"
)


@pytest.mark.parametrize(
    ("step", "line"),
    [
        (raises(DataError("there is no photos")), "there is no photos"),
        (raises(DivergedError("the losses\nare not finite")), "the losses are not finite"),
        (lambda: Path("nowhere/file").read_text(), "cannot read or write nowhere/file: No such file or directory"),
        (raises(OSError(errno.ENOSPC, "No space left")), "cannot read or write runs: No space left"),
        (raises(ModuleNotFoundError("no", name="timm")), "this needs the package timm, which is not installed"),
        (allocate_too_much, f"there is not enough memory for {TOO_LARGE} bytes more: lower --batch-size"),
        (raises(MemoryError()), "there is not enough memory: lower --batch-size"),
        (raises(torch.cuda.OutOfMemoryError(CUDA)), "there is not enough memory for 2.50 GiB more: lower --batch-size"),
        (
            raises(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")),
            "a process that reads images has died (DataLoader worker (pid 7) is killed by signal: Killed.): take fewer --workers",
        ),
    ],
)
def test_what_can_be_foreseen_is_one_line_and_status_2(
    step: Callable[[], object], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(step, capsys) == (2, f"error: {line}\n")


def test_an_end_without_trouble_is_0_or_what_the_script_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(lambda: None, capsys) == (0, "")
    assert ended(lambda: 130, capsys) == (130, "")


def test_an_interrupt_is_one_line_and_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(raises(KeyboardInterrupt()), capsys) == (130, "\nstopped; go on\n")


def test_of_several_processes_each_says_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert ended(raises(DataError("there is no photos")), capsys) == (2, "rank 1: there is no photos\n")


def test_a_mistake_of_the_scripts_own_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ended(lambda: torch.ones(2, 3) @ torch.ones(2, 3), capsys)


FIRST_STEPS = {  # of each script: what its work begins with, and arguments with which it comes so far
    "pretrain": ("load", ""),
    "linear_eval": ("chosen", "run"),
    "knn_eval": ("chosen", "run"),
    "few_labels": ("load", "RUN"),
    "figures": ("read_json", "losses run"),
    "overlap_curve": ("load", ""),
    "memory": ("count", ""),
    "diagnose": ("load", "--out OUT"),
    "decoder_depth": ("ablation.run_row", "--out OUT"),
    "sharing": ("ablation.run_row", "--out OUT"),
    "detection.train": ("start", ""),
    "detection.segment": ("start", ""),
    "detection.draw": ("load_detector", "run"),
    "detection.splits": ("parts", "--data here"),
    "detection.compare": ("train.main", "random --out OUT"),
}
STANDING_ALONE = {"quickstart", "wrap_your_own", "pipeline"}  # to be copied, and so with an end of their own


@pytest.mark.parametrize("script", FIRST_STEPS)
def test_every_script_ends_by_the_same_lines(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if script.startswith("detection."):
        pytest.importorskip("faster_coco_eval")
        pytest.importorskip("torchmetrics")
    (tmp_path / "run.json").write_text(
        '{"arch": "resnet18", "image_size": 32, "mean": [], "std": [], "data": "digits"}'
    )
    module = importlib.import_module(script.removeprefix("detection."))
    step, given = FIRST_STEPS[script]
    argv = [str(tmp_path) if word in ("RUN", "OUT") else word for word in given.split()]

    def fails_with(problem: BaseException) -> tuple[object, str]:
        *owner, name = step.split(".")
        monkeypatch.setattr(getattr(module, owner[0]) if owner else module, name, lambda *a, **k: raises(problem)())
        try:
            status: object = module.main(argv)
        except SystemExit as stopped:
            status = stopped.code
        return status, capsys.readouterr().err

    status, said = fails_with(DataError("it is broken"))
    assert (status, said.splitlines()[-1]) == (2, "error: it is broken")
    status, said = fails_with(KeyboardInterrupt())
    assert (status, said.splitlines()[-1].split(";")[0]) == (130, "stopped")


def test_no_script_is_left_out() -> None:
    scripts = {path for place in ("", "detection") for path in (EXAMPLES / place).glob("*.py")}
    found = {path for path in scripts if "def main(" in path.read_text() or "main = " in path.read_text()}
    names = {".".join(path.relative_to(EXAMPLES).with_suffix("").parts) for path in found}
    assert names - STANDING_ALONE - {"ablation"} == FIRST_STEPS.keys()


@pytest.mark.skipif(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, reason="Ctrl-C is ignored here, and so there")
@pytest.mark.parametrize("script", FIRST_STEPS)
def test_an_interrupt_while_a_script_still_imports_is_one_line(script: str, tmp_path: Path) -> None:
    """It comes where torch would be imported."""
    if script.startswith("detection."):
        pytest.importorskip("faster_coco_eval")
        pytest.importorskip("torchmetrics")
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    command = [sys.executable, str(EXAMPLES / f"{script.replace('.', '/')}.py")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nstopped; nothing was begun\n")


def test_an_interrupt_of_a_scripts_own_work_is_an_exception_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert not stoppable.a_script_runs()
    before, heard = signal.signal(signal.SIGINT, stoppable.stop), []
    try:
        assert ended(lambda: heard.append(signal.getsignal(signal.SIGINT)), capsys) == (0, "")
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.default_int_handler]


@pytest.mark.parametrize(
    ("script", "argv", "line"),
    [
        ("few_labels", "{run} --percent 10", "start again with: python examples/few_labels.py {run} --percent 10"),
        ("linear_eval", "run", "start again with: python examples/linear_eval.py run"),
        (
            "linear_eval",
            "run --protocol paper",
            "go on after the last finished epoch with: python examples/linear_eval.py run --protocol paper --resume",
        ),
    ],
)
def test_a_read_out_that_is_stopped_says_the_command_that_goes_on(
    script: str,
    argv: str,
    line: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = {"arch": "resnet18", "image_size": 32, "mean": [], "std": [], "data": "digits"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    module = importlib.import_module(script)
    monkeypatch.setattr(module, FIRST_STEPS[script][0], lambda *a, **k: raises(KeyboardInterrupt())())
    assert module.main(argv.format(run=tmp_path).split()) == 130
    assert capsys.readouterr().err == f"\nstopped; {line.format(run=tmp_path)}\n"


def test_what_detection_needs_beside_the_examples_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / "detection/extra.py"))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "error: this needs the packages faster_coco_eval and torchmetrics, which come with: "
        'pip install -e ".[detection]"\n'
    )


def test_numbers_have_an_end_where_they_are_given_one(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = Parser()
    arguments.add_argument("--percent", type=number_from(0, above=True, most=100))
    assert arguments.parse_args(["--percent", "100"]).percent == 100
    for text in ("0", "100.5", "inf", "nan"):
        with pytest.raises(SystemExit):
            arguments.parse_args(["--percent", text])
        line = f"error: argument --percent: expected a number above 0 up to 100, got '{text}'\n"
        assert capsys.readouterr().err == line


@pytest.mark.parametrize("name", ["meta", "abacus", "cuda:99", "vulkan", "xla", "cpu:x"])
def test_a_device_that_does_not_compute_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from pretraining.pretrain_options import parser

    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(["--device", name])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: argument --device: {name!r} is no device of this machine\n"
