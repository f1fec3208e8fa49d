"""The script for the day a GPU is there runs, stops, and goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import on_gpu
import pytest

SCRIPT = Path(on_gpu.__file__)


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_piece_runs_at_a_tiny_size_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    first = run(tmp_path, "--only", "memory-tiny-overlap1", "--budget", "60s")
    assert first.returncode == 0, first.stderr
    assert "memory-tiny-overlap1: holds" in first.stdout
    rest = run(tmp_path, "--resume")
    assert rest.returncode == 0, rest.stdout + rest.stderr
    assert "memory-tiny-overlap1: holds, known" in rest.stdout
    written = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert written.keys() == {piece.name for piece in on_gpu.pieces("cpu")}
    assert all(found["holds"] and found["hardware"] for found in written.values())
    assert written["memory-tiny-overlap1"]["predicted_bytes"] > written["memory-tiny-overlap0"]["predicted_bytes"] > 0


def test_nothing_begins_that_is_not_expected_to_end_in_time(tmp_path: Path) -> None:
    ended = run(tmp_path, "--budget", "1s")
    assert ended.returncode == 0
    assert ended.stdout.count("left for a later call") == len(list(on_gpu.pieces("cpu")))
    assert not list(tmp_path.iterdir())


def test_a_piece_that_fails_is_told_and_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(device: str) -> dict[str, object]:
        raise ArithmeticError("as told")

    fine = on_gpu.Piece("fine", 1, lambda device: {"holds": True})
    monkeypatch.setattr(on_gpu, "pieces", lambda device: [on_gpu.Piece("fails", 1, fails), fine])
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--device", "cpu", "--out", str(tmp_path)])
    assert on_gpu.main() == 1
    assert json.loads((tmp_path / "fails.json").read_text())["error"] == "ArithmeticError: as told"
    assert json.loads((tmp_path / "fine.json").read_text())["holds"]
