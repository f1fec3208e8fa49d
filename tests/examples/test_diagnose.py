"""The pictures of the page on diagnosis are drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the examples need the extra `examples`")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import diagnose

PAGE = Path(__file__).parents[2] / "docs/diagnosis.md"


def test_every_picture_of_the_page_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(diagnose, "PROBED", ("overlap 1",))
    assert diagnose.main(["--steps", "2", "--out", str(tmp_path)]) == 0
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (PAGE.parent / "diagnosis").glob("*.png")} - {"cuts.png"}
    assert all(f"(diagnosis/{name})" in PAGE.read_text() for name in drawn)
    out = capsys.readouterr().out
    assert "overlap 1: cosines by stage" in out
    assert "linear CKA" in out
