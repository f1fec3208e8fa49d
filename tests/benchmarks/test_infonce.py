"""benchmarks/infonce.py --device runs, with whatever other losses are installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import infonce
import infonce_cuda
import pytest
import torch
from torch import Tensor


def test_each_row_is_written_as_it_comes_and_the_page_has_them_all(tmp_path: Path) -> None:
    lines, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    command = [sys.executable, infonce.__file__, "--device", "cpu", "--quick", "--json", lines, "--write", page]
    subprocess.run(command, check=True, capture_output=True)
    head, *rows = map(json.loads, lines.read_text().splitlines())
    assert min(head["tflops"].values()) > 0
    assert len(rows) % len(infonce_cuda.cases("cpu", quick=True)) == 0
    ours = [row for row in rows if row["loss"].startswith("locallearn")]
    assert {row["form"] for row in ours} == infonce_cuda.PAIRS.keys()
    assert all(row["ms"] > 0 and row["floor_ms"] > 0 and row["peak_mb"] > row["kept_mb"] > 0 for row in ours)
    assert all(("ms" in row) != ("skipped" in row) for row in rows)
    assert page.read_text().count(" ms (") == sum("ms" in row for row in rows)


def test_what_is_missing_or_fails_or_comes_too_late_is_told() -> None:
    def missing() -> None:
        raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere")

    def wrong() -> object:
        return lambda *views: torch.zeros(2) @ torch.zeros(3)

    every = [("NT-Xent", "missing", missing), ("NT-Xent", "wrong", wrong)]
    case = infonce_cuda.cases("cpu", quick=True)[:1]
    setting = infonce_cuda.Setting("cpu", case, 60, 100)
    _, absent, failed = infonce_cuda.records(every, infonce.memory, setting)
    assert absent["skipped"] == "not installed (nowhere)"
    assert failed["skipped"].startswith("RuntimeError")
    _, late, _ = infonce_cuda.records(every, infonce.memory, setting._replace(seconds=-1))
    assert late["skipped"] == "no time left"


@pytest.mark.parametrize("form", infonce_cuda.PAIRS)
def test_plain_torch_is_the_same_loss(form: str) -> None:
    views: list[Tensor] = [torch.randn(6, 4, dtype=torch.float64) for _ in range(2)]
    settings = {} if form == "NT-Xent" else {"form": form}
    torch.testing.assert_close(infonce_cuda.plain(form, 0.1)(*views), infonce.ours(**settings)()(*views))
