"""examples/pipeline.py by torchrun: two processes, gone on with, and as many steps in one process, give the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="the examples need the extra `examples`")
pytest.importorskip("tqdm")

EXAMPLE = Path(__file__).parents[2] / "examples/pipeline.py"
TINY = ["--width", "4", "--batch", "16", "--every", "2"]


def ran(processes: int, *arguments: str) -> str:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        str(EXAMPLE),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *TINY, *arguments], check=False, capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"nearest neighbour: ([\d.]+%)", done.stdout)
    assert found is not None
    return found[1]


def test_two_processes_that_go_on_end_where_one_does(tmp_path: Path) -> None:
    ran(2, "--folder", str(tmp_path / "two"), "--steps", "2")
    again = ran(2, "--folder", str(tmp_path / "two"), "--steps", "4")
    assert again == ran(1, "--folder", str(tmp_path / "one"), "--steps", "4", "--stages", "4")
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"latest", "step-2", "step-4"}
