"""What people copy is one short file each: taken along alone, it runs from an empty folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the examples need the extra `examples`")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).parents[2] / "examples"
FEW_STEPS = {
    "quickstart.py": ["--epochs", "1", "--batch-size", "600"],
    "wrap_your_own.py": ["--epochs", "1"],
    "pipeline.py": ["--width", "4", "--batch", "16", "--steps", "2"],
    **{f"trainers/{path.name}": ["2"] for path in (EXAMPLES / "trainers").glob("*.py")},
}
NEEDS = {"accelerate_loop": "accelerate", "lightning_module": "lightning", "hf_trainer": "transformers"}
NEEDS["loggers"] = "tensorboard"


@pytest.mark.parametrize("name", FEW_STEPS)
def test_an_example_to_copy_is_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) <= 150


@pytest.mark.parametrize("name", FEW_STEPS)
def test_an_example_to_copy_runs_alone(name: str, tmp_path: Path) -> None:
    """With nothing of the repository's but the package on its path, and of its own folder nothing but itself."""
    pytest.importorskip(NEEDS.get(Path(name).stem, "torch"))
    copy = Path(shutil.copy(EXAMPLES / name, tmp_path))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"] if name == "pipeline.py" else []
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launch, copy.name, *FEW_STEPS[name]]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_a_pipeline_without_torchrun_says_how_it_is_started(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "pipeline.py")]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr == "error: torchrun starts it: torchrun --nproc-per-node 2 examples/pipeline.py\n"


@pytest.mark.parametrize("name", ["quickstart.py", "wrap_your_own.py", "pipeline.py"])
def test_help_does_not_train(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / name), "--help"]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "COLUMNS": "80"}
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert re.match("usage: ", done.stdout)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert not list(tmp_path.iterdir())
