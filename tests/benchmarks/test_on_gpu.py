"""The script for the day a GPU is there runs, stops, and goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gpu_page
import gpu_pieces
import on_gpu
import pytest

SCRIPT = Path(on_gpu.__file__)


def pieces(out: Path, *options: str) -> list[gpu_pieces.Piece]:
    return list(gpu_pieces.pieces(on_gpu.parser().parse_args(["--device", "cpu", "--out", str(out), *options])))


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_piece_runs_at_a_tiny_size_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    first = run(tmp_path, "--only", "memory-tiny-overlap1", "--budget", "60s")
    assert first.returncode == 0, first.stderr
    assert "memory-tiny-overlap1: holds" in first.stdout
    rest = run(tmp_path, "--resume", "--data", "digits", "--jobs", "1")
    assert rest.returncode == 0, rest.stdout + rest.stderr
    assert "memory-tiny-overlap1: holds, known" in rest.stdout
    written = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert written.keys() == {piece.name for piece in pieces(tmp_path, "--data", "digits")}
    assert all(found["holds"] and found["hardware"] for found in written.values())
    assert written["memory-tiny-overlap1"]["predicted_bytes"] > written["memory-tiny-overlap0"]["predicted_bytes"] > 0
    assert [one["curve"] for one in written["curves-short"]["runs"]] == ["contrastive-6-short"]
    page = run(tmp_path, "--page", str(tmp_path / "page"))
    assert page.returncode == 0, page.stderr
    told = (tmp_path / "page" / "on_gpu.md").read_text()
    assert all(heading in told for heading in ("## Memory", "## A step", "### shufflenet", "## Overhead", "## InfoNCE"))
    kept = json.loads((tmp_path / "page" / "on_gpu.json").read_text())
    assert gpu_page.text(kept) == told


def test_nothing_begins_that_is_not_expected_to_end_in_time(tmp_path: Path) -> None:
    ended = run(tmp_path, "--budget", "1s")
    assert ended.returncode == 0
    assert ended.stdout.count("left for a later call") == len(pieces(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_piece_that_fails_is_told_and_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(device: str) -> dict[str, object]:
        raise ArithmeticError("as told")

    fine = on_gpu.Piece("fine", 1, lambda device: {"holds": True})
    monkeypatch.setattr(on_gpu, "pieces", lambda args: [on_gpu.Piece("fails", 1, fails), fine])
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--device", "cpu", "--out", str(tmp_path)])
    assert on_gpu.main() == 1
    assert json.loads((tmp_path / "fails.json").read_text())["error"] == "ArithmeticError: as told"
    assert json.loads((tmp_path / "fine.json").read_text())["holds"]


def test_what_failed_is_tried_again_and_what_is_unfinished_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []

    def fails_once(device: str) -> dict[str, object]:
        calls.append("fails once")
        if len(calls) == 1:
            raise ArithmeticError("as told")
        return {"holds": True}

    def takes_two(device: str, budget: float | None) -> dict[str, object]:
        calls.append(f"takes two, {budget}")
        return {"holds": True, "runs": [], "unfinished": len(calls) < 3}

    found = [gpu_pieces.Piece("once", 1, fails_once), gpu_pieces.Piece("two", 1, takes_two, limited=True)]
    monkeypatch.setattr(on_gpu, "pieces", lambda args: found)
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--device", "cpu", "--out", str(tmp_path), "--resume"])
    assert [on_gpu.main() for _ in range(3)] == [1, 0, 0]
    assert calls == ["fails once", "takes two, None", "fails once", "takes two, None"]
    assert {path.name for path in tmp_path.glob("*.json")} == {"once.json", "two.json"}
    assert "goes on with --resume" in capsys.readouterr().out
