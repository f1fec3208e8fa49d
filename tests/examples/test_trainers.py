"""The recipes for trainers: each is one short file that runs for two steps and tells what every unit did."""

from __future__ import annotations

import ast
import math
import re
import runpy
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("sklearn", reason="the examples need the extra `examples`")

from locallearn.diagnosis import Monitor

FOLDER = Path(__file__).parents[2] / "examples/trainers"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture(autouse=True)
def as_a_user_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)


def recipe(name: str, needs: str | None = None) -> ModuleType:
    if needs is not None:
        pytest.importorskip(needs, reason='comes with pip install -e ".[dev]"')
    spec = spec_from_file_location(f"recipe_{name}", FOLDER / f"{name}.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # lightning looks the module of a callback up
    spec.loader.exec_module(module)
    return module


NUMBERS = ("loss", "top1", "spread", "effective_rank")


def assert_read(flat: dict[str, float], units: int, names: tuple[str, ...] = NUMBERS) -> None:
    for name in names:
        for k in range(units):
            assert math.isfinite(flat[f"{name}/unit_{k}"])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_one_short_file(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 72
    imported = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    imported |= {a.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for a in node.names}
    siblings = {path.stem for path in FOLDER.parent.iterdir()} | set(RECIPES)
    assert not {module.split(".")[0] for module in imported} & siblings
    assert f"python examples/trainers/{name}.py" in text or f"launch examples/trainers/{name}.py" in text


NEEDS = {"accelerate_loop": "accelerate", "lightning_module": "lightning", "hf_trainer": "transformers"}


@pytest.mark.filterwarnings("ignore")  # of those packages' own
@pytest.mark.parametrize("name", RECIPES)
def test_help_does_not_train(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(NEEDS.get(name, "torch"))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert stopped.value.code == 0
    assert re.match(rf"usage: {name}\.py \[-h\] \[STEPS\]\n", capsys.readouterr().out)
    assert not list(tmp_path.iterdir())


def test_every_recipe_is_run_below() -> None:
    run = re.findall(r'^    \w* ?=? ?recipe\("(\w+)"', Path(__file__).read_text(), re.MULTILINE)
    assert sorted(run) == RECIPES


def test_a_plain_loop(capsys: pytest.CaptureFixture[str]) -> None:
    module = recipe("plain_loop")
    monitor = module.main(2)
    assert [at for at, _ in monitor.history] == [1]
    assert_read(monitor.history[0][1], units=3)
    assert "kNN votes among all 1,437 training images" in capsys.readouterr().out


def test_accelerate() -> None:
    module = recipe("accelerate_loop", "accelerate")
    monitor = module.main(2)
    assert_read(monitor.history[0][1], units=3)


@pytest.mark.filterwarnings("ignore")  # of lightning's own, which differ from release to release
def test_lightning() -> None:
    module = recipe("lightning_module", "lightning")
    trainer = module.main(2)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert trainer.global_step == 2
    assert_read(metrics, units=2)
    assert all(0.1 < metrics[f"knn/stage_{k}"] <= 1 for k in range(3))


@pytest.mark.filterwarnings("ignore")  # of transformers' own, likewise
def test_hugging_faces_trainer() -> None:
    module = recipe("hf_trainer", "transformers")
    trainer = module.main(2)
    assert trainer.state.global_step == 2
    (logged,) = [line for line in trainer.state.log_history if "loss" in line]
    assert_read(logged, units=2)


def test_an_ema_teacher() -> None:
    module = recipe("ema_teacher")
    monitor = module.main(2)
    assert_read(monitor.history[0][1], units=2, names=("loss", "spread", "effective_rank"))


def test_tensorboard_and_what_logs_like_wandb(tmp_path: Path) -> None:
    module = recipe("loggers", "tensorboard")

    class Run:
        def __init__(self) -> None:
            self.lines: list[tuple[int, dict[str, float]]] = []

        def log(self, values: dict[str, float], step: int) -> None:
            self.lines.append((step, values))

    run = Run()
    assert isinstance(module.main(12, run), Monitor)
    assert [step for step, _ in run.lines] == [0, 10]
    assert_read(run.lines[1][1], units=2)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module.main(2)
    events = EventAccumulator(str(tmp_path / "runs/loggers"))
    events.Reload()
    assert set(run.lines[0][1]) == set(events.Tags()["scalars"])
