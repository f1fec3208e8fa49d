"""Tables of measured numbers are what their records say: each page is made again from the JSON beside it, and compared."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="the examples need the extra `examples`")
pytest.importorskip("timm", reason="the extra `examples` has timm")
pytest.importorskip("transformers", reason="the extra `dev` has transformers")

import gpu_page
import infonce
import many_units
import overlap_curve
import scale_page
import step_page
from curves.results import markdown
from works.page import text as works_with

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "benchmarks/infonce": ("benchmarks/infonce", infonce.page),
    "benchmarks/gpu": ("benchmarks/on_gpu", gpu_page.text),
    "benchmarks/local_step": ("benchmarks/local_step", step_page.text),
    "benchmarks/many_units": ("benchmarks/many_units", many_units.page),
    "benchmarks/scale": ("benchmarks/scale", scale_page.text),
    "works-with": ("works-with", works_with),
}
# Tables of measured numbers that have no record yet, by page, with what measures them. To be emptied, never to be filled.
UNRECORDED = {
    "docs/diagnosis.md": (1, "python benchmarks/monitor.py"),
    "docs/infonce.md": (1, "python benchmarks/infonce.py"),
    "docs/reproduce.md": (3, "the commands below them"),
}
PAPERS = {
    "docs/reproduce.md": 1,
    "docs/scaling.md": 1,
}  # of papers, and of a replay of equal costs, which a test computes


def record(name: str) -> Any:
    return json.loads((DOCS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_its_record_says(name: str) -> None:
    stem, made = PAGES[name]
    assert (DOCS / f"{stem}.md").read_text() == made(record(stem))


def test_the_curves_of_overlap_are_those_of_the_runs() -> None:
    page = DOCS / "reproduce.md"
    lines = [json.loads(line) for line in (DOCS / "reproduce/overlap_curve.jsonl").read_text().splitlines()]
    assert page.read_text() == overlap_curve.with_tables(page, markdown(lines))
    assert all(line["commit"] and line["versions"] and line["machine"] for line in lines if "accuracy" in line)


def test_the_short_table_of_two_processes_is_that_of_the_record() -> None:
    found = re.search(r"<!-- benchmarks/scale.py -->\n(.*?)<!-- end -->", (DOCS / "scaling.md").read_text(), re.DOTALL)
    assert found is not None
    assert found[1] == scale_page.summary(record("benchmarks/scale"))


def test_the_quickstarts_table_is_that_of_its_run() -> None:
    """Accuracies are of 510 held-out digits, with their standard error."""
    run = record("quickstart")
    columns = "units | linear probe, % | kNN, % | peak activations, MB | GFLOP of a step"
    lines = [f"| {run['epochs']} epochs of batch {run['batch_size']} | {columns} |", "|---|" + "--:|" * 5]
    for name, (*accuracies, peak, flops) in run["table"].items():
        units = str(len(run["losses"][name][0])) if name in run["losses"] else ""
        shown = [f"{p:.1f} ± {(p * (100 - p) / 510) ** 0.5:.1f}" for p in accuracies]
        costs = ["", ""] if peak is None else [f"{peak:.1f}", f"{flops:.2f}"]
        lines.append(re.sub(" +", " ", f"| {name} | {units} | {' | '.join([*shown, *costs])} |"))
    table = "\n".join(lines).replace("|  |", "| |")
    assert f"<!-- examples/quickstart.py -->\n{table}\n<!-- end -->" in (ROOT / "README.md").read_text()
    assert run["commit"]
    assert run["torch"] in run["machine"] or run["torch"].split("+")[0] in run["machine"]


def test_records_say_by_what_they_were_made() -> None:
    for found in map(record, ("benchmarks/infonce", "benchmarks/many_units", "benchmarks/scale")):
        assert found["commit"]
        assert "torch" in found["machine"]
        assert found["command"].startswith("python benchmarks/")
    for table in record("benchmarks/local_step")["tables"].values():
        assert table["commit"]
        assert "torch" in table["machine"]
    for row in record("works-with")["rows"].values():
        assert row["commit"]
        assert "torch" in row["versions"]
        assert row["machine"]


def measured_tables(text: str) -> int:
    """Tables outside of places that are written from records, half of whose cells beside the first column are numbers."""
    text = re.sub(r"^<!-- \w+/\S+\.py.*?^<!-- end -->$", "", text, flags=re.MULTILINE | re.DOTALL)
    count = 0
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        _, _, *rows = (line.strip().strip("|").split("|") for line in table.splitlines())
        cells = [cell.strip() for row in rows for cell in row[1:] if cell.strip()]
        numbers = [cell for cell in cells if re.match(r"[-+]?\d[\d,]*\.?\d*(e[-+]\d+)?( ?[%x]| ms| ±| to|$)", cell)]
        count += 2 * len(numbers) > len(cells)
    return count


def test_no_other_table_of_numbers_stands_in_the_docs() -> None:
    recorded = {DOCS / f"{stem}.md" for stem, _ in PAGES.values()}
    pages = [*ROOT.glob("*.md"), *DOCS.glob("**/*.md"), *(ROOT / "examples").glob("**/*.md")]
    found = {}
    for page in pages:
        if page not in recorded and DOCS / "examples" not in page.parents:
            name = page.relative_to(ROOT).as_posix()
            if count := measured_tables(page.read_text()) - PAPERS.get(name, 0):
                found[name] = count
    assert found == {name: count for name, (count, _) in UNRECORDED.items()}
