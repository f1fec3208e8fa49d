"""benchmarks/works_with.py: one network of each kind, and a page that says what was found and nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm", reason="the extra `examples` has timm")
pytest.importorskip("transformers", reason="the extra `dev` has transformers")
import works_with
from works.page import text, works
from works.row import row

DOCS = Path(__file__).parents[2] / "docs"
RECORD: dict[str, Any] = json.loads((DOCS / "works-with.json").read_text())
MADE = {"commit": "c", "versions": "v", "machine": "m"}


@pytest.fixture(autouse=True)
def single_precision() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "name", ["mobilenet_v3_small", "timm convnext_atto", "transformers bert", "LSTMs", "mixture of experts"]
)
def test_a_network_of_each_kind_works_as_the_page_says(name: str) -> None:
    found = row(works_with.networks()[name])
    assert works(found)
    assert works(found["checkpoint"])
    assert "stages" in found["auto"]
    told = RECORD["rows"][name]
    assert [found[key] for key in ("kind", "stages", "dtype")] == [told[key] for key in ("kind", "stages", "dtype")]
    json.dumps(found)


@pytest.mark.parametrize("name", ["U-Net", "transformers xlnet"])
def test_what_is_refused_works_by_its_ways_out(name: str) -> None:
    found = row(works_with.networks()[name])
    assert "refused" in found
    assert not works(found)
    assert found["ways"]
    assert all(works(way) for way in found["ways"])


def test_the_page_is_made_of_what_is_kept() -> None:
    assert (DOCS / "works-with.md").read_text() == text(RECORD)


def test_every_network_has_a_row_or_is_said_to_be_missing() -> None:
    assert {*RECORD["rows"], *RECORD["missing"]} == {*works_with.networks()}
    assert not {*RECORD["rows"]} & {*RECORD["missing"]}


def right(error: float = 1e-15, **more: Any) -> dict[str, Any]:
    compared = {"errors": {"local_step": error, "loss.backward()": error}, "wrong": [], "dtype": "float64"}
    auto = {"seconds": 0.5, "stages": ["a"] * 4}
    return {
        "kind": "own",
        "stages": ["a"],
        **compared,
        "checkpoint": {"policy": "True", **compared},
        "auto": auto,
        **MADE,
        **more,
    }


def test_the_page_tells_what_is_wrong_refused_failed_and_missing() -> None:
    way = {key: value for key, value in right(2e-16).items() if key in ("errors", "wrong", "dtype")}
    rows = {
        "Good": right(ways=[]),
        "Bad": right(1e-3, ways=[]),
        "Crossing": {
            "kind": "own",
            "stages": ["b"],
            "refused": "a skip | connection",
            "auto": {"refused": "no"},
            "ways": [{"text": "cut elsewhere", "stages": ["c"], **way}],
            **MADE,
        },
        "Crashed": {"kind": "own", "failed": "the process ended with status -11", **MADE},
    }
    page = text({"rows": rows, "missing": ["Later"]})
    assert "**1 of 4 networks**" in page
    assert '| Good | `stages=["a"]` | 1e-15 | 1e-15 | 1e-15 | 0.5 |' in page
    assert '| Crossing | `stages=["b"]` | a skip \\| connection | cut elsewhere | `stages=["c"]` | 2e-16 |' in page
    bad = page.split("## Not right")[1]
    assert "| Bad |" in bad
    assert "| Crashed | the process ended with status -11 |" in bad
    assert page.endswith("Later.\n")


def test_what_has_a_row_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def rows(names: list[str], jobs: int, timeout: float) -> Iterator[tuple[str, dict[str, Any]]]:
        asked.extend(names)
        yield names[0], right(ways=[])

    monkeypatch.setattr(works_with, "rows", rows)
    monkeypatch.setattr(sys, "argv", ["works_with.py", "--write", str(tmp_path), "--kind", "own"])
    works_with.main()
    first, asked[:] = asked[0], []
    works_with.main()
    assert first not in asked
    kept = json.loads((tmp_path / "works-with.json").read_text())
    assert first in kept["rows"]
    assert asked[1] in kept["missing"]
    assert (tmp_path / "works-with.md").read_text() == text(kept)


def test_a_network_that_takes_too_long_is_a_row_that_says_so() -> None:
    found = works_with.alone("LSTMs", 0.0)
    assert found["failed"] == "not done after 0 seconds"
