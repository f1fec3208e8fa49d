"""Tables of measured numbers are what their records say: each page is made again from the JSON beside it, and compared."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="the examples need the extra `examples`")
pytest.importorskip("timm", reason="the extra `examples` has timm")
pytest.importorskip("transformers", reason="the extra `dev` has transformers")

import pages

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# tables of numbers that are not ours: of papers, and of a replay of equal costs, which a test computes
OF_OTHERS = {"docs/reproduce.md": 1, "docs/scaling.md": 1}


@pytest.mark.parametrize("page", pages.PAGES)
def test_a_page_is_what_its_records_say(page: str) -> None:
    assert (ROOT / page).read_text() == pages.made(page)


def tellings(record: Any) -> Iterator[dict[str, Any]]:
    """The outermost parts of a record that say by which commit they were made."""
    if isinstance(record, dict) and "commit" in record:
        yield record
    elif isinstance(record, dict | list):
        for part in record.values() if isinstance(record, dict) else record:
            yield from tellings(part)


RECORDS = sorted({name for name, _ in pages.WHOLE.values()} | {place.record for place in pages.PLACES})


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_says_by_what_it_was_made(name: str) -> None:
    record = pages.record(name)
    if isinstance(record, list):  # a line for each run, and times of steps, which come of no run
        runs = [line for line in record if "step_ms" not in line]
        assert all(list(tellings(run)) for run in runs)
    found = list(tellings(record))
    assert found
    for part in found:
        assert part["commit"]
        machine = part.get("machine") or part["hardware"]
        assert "torch" in part or "torch" in machine or "torch" in part["versions"]
        assert not re.search(r"""[\s"'=]/\w""", str(part)), "a path of the machine"


@pytest.mark.parametrize("name", ["infonce", "many_units", "scale"])
def test_a_benchmarks_record_has_its_command(name: str) -> None:
    assert pages.record(f"benchmarks/{name}.json")["command"].startswith("python benchmarks/")


def test_the_quickstarts_machine_names_its_torch() -> None:
    for run in pages.record("quickstart"):
        assert run["torch"].split("+")[0] in run["machine"]


def test_a_table_is_put_in_the_place_of_the_one_that_is_there() -> None:
    place = pages.Place("page.md", "examples/some.py", "diagnosis/monitor.json", lambda record: "new\n")
    start, end = "# Title\n\n<!-- examples/some.py -->\n", "<!-- end -->\n\n<!-- end -->\nrest\n"
    assert pages.put(f"{start}old\n{end}", place) == f"{start}new\n{end}"
    with pytest.raises(ValueError, match=r"page\.md needs one place from <!-- examples/some\.py --> .* it has 0"):
        pages.put("# Title\n", place)


def measured_tables(text: str) -> int:
    """Tables outside of places that are written from records, half of whose cells beside the first column are numbers."""
    text = re.sub(r"^<!-- \w+/\S+\.py.*?^<!-- end -->$", "", text, flags=re.MULTILINE | re.DOTALL)
    count = 0
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        _, _, *rows = (line.strip().strip("|").split("|") for line in table.splitlines())
        cells = [cell.strip() for row in rows for cell in row[1:] if cell.strip()]
        numbers = [cell for cell in cells if re.match(r"[-+]?\d[\d,]*\.?\d*(e[-+]\d+)?( ?[%x]| ms| ±| to| \(|$)", cell)]
        count += 2 * len(numbers) > len(cells)
    return count


def test_no_other_table_of_numbers_stands_in_the_docs() -> None:
    files = [*ROOT.glob("*.md"), *DOCS.glob("**/*.md"), *(ROOT / "examples").glob("**/*.md")]
    names = [file.relative_to(ROOT).as_posix() for file in files if DOCS / "examples" not in file.parents]
    found = {name: measured_tables((ROOT / name).read_text()) for name in names if name not in pages.WHOLE}
    assert {name: count for name, count in found.items() if count} == OF_OTHERS


def test_every_place_for_a_table_has_its_record() -> None:
    marks = {
        (file.relative_to(ROOT).as_posix(), mark)
        for file in [ROOT / "README.md", *DOCS.glob("**/*.md"), *(ROOT / "examples").glob("*.md")]
        for mark in re.findall(r"^<!-- ((?:examples|benchmarks)/\S+\.py.*?) -->$", file.read_text(), re.MULTILINE)
        if DOCS / "examples" not in file.parents
    }
    assert marks == {(place.page, place.mark) for place in pages.PLACES}
