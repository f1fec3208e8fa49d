"""Every table of measured numbers in the docs, written from its record: `python benchmarks/pages.py`.

A record is a JSON beside the page that says what was measured, with which commit and versions and on what machine. Some pages
are made of one as a whole. In the others a table stands between `<!-- what made it -->` and `<!-- end -->`. Names the
pages that changed; a test asks that there be none. After a new measurement put its record into docs/ and run this.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import gpu_page
import infonce
import many_units
import memory
import monitor
import scale_page
import step_page
from command_line import write
from curves.presets import PRESETS, START
from curves.results import markdown, markdown_of_stages, mean_and_spread, row_name, table_of_stages
from works.page import text as works_with

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
STAGES_OF = {curve.name: curve.setting.stages for preset in PRESETS.values() for curve in preset}


class Place(NamedTuple):
    """A table inside of a page."""

    page: str  # from the repository's root
    mark: str  # what made it
    record: str  # file or folder under docs/
    text: Callable[[Any], str]


def quickstart(run: dict[str, Any]) -> str:
    """Accuracies are of 510 held-out digits, with their standard error."""
    columns = "units | linear probe, % | kNN, % | peak activations, MB | GFLOP of a step"
    lines = [f"| {run['epochs']} epochs of batch {run['batch_size']} | {columns} |", "|---|" + "--:|" * 5]
    for name, (*accuracies, peak, flops) in run["table"].items():
        units = str(len(run["losses"][name][0])) if name in run["losses"] else ""
        shown = [f"{p:.1f} ± {(p * (100 - p) / 510) ** 0.5:.1f}" for p in accuracies]
        costs = ["", ""] if peak is None else [f"{peak:.1f}", f"{flops:.2f}"]
        lines.append(re.sub(r"\| +(?=\|)", "| ", f"| {name} | {units} | {' | '.join([*shown, *costs])} |"))
    return "\n".join(lines) + "\n"


def quickstart_by_seed(runs: Sequence[dict[str, Any]]) -> str:
    """Linear probe (kNN) of each method and seed."""
    lines = [f"| seed | {' | '.join(str(run['seed']) for run in runs)} | mean |", "|---|" + "--:|" * (len(runs) + 1)]
    for name in (name for name in runs[0]["table"] if name in runs[0]["losses"]):
        found = [run["table"][name][:2] for run in runs]
        found.append([statistics.fmean(values) for values in zip(*found, strict=True)])
        lines.append(f"| {name} | {' | '.join(f'{linear:.1f} ({nearest:.1f})' for linear, nearest in found)} |")
    return "\n".join(lines) + "\n"


def steps(record: dict[str, Any]) -> str:
    """Without larger overlaps, which memory.py prints too."""
    rows = [memory.MethodRow(**row) for row in record["methods"]]
    return memory.markdown([row for row in rows if not row.method.startswith("`overlap=")]) + "\n"


def few_labels(runs: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds of each row of a curve, and of the same network from a random start."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        row = run["run"]["row"] if run["start"] == "trained" else START
        name = row_name(row, STAGES_OF[run["run"]["curve"]])
        for percent, accuracy in run["accuracy"].items():
            found.setdefault(name, {}).setdefault(percent, []).append(100 * accuracy)
    percents = list(next(iter(found.values())))
    lines = [f"| overlap | {' | '.join(f'{percent} % of labels' for percent in percents)} |", "|---|--:|--:|"]
    lines += [f"| {name} | {' | '.join(map(mean_and_spread, by.values()))} |" for name, by in found.items()]
    return "\n".join(lines) + "\n"


def segmentation(runs: Sequence[dict[str, Any]]) -> str:
    """The mIoU of every stage."""
    found: dict[str, list[list[float]]] = {}
    for run in runs:
        found.setdefault(row_name(run["row"], len(run["stages"])), []).append(run["miou"])
    return table_of_stages(found)


WHOLE: dict[str, tuple[str, Callable[[Any], str]]] = {
    "docs/benchmarks/infonce.md": ("benchmarks/infonce.json", infonce.page),
    "docs/benchmarks/on_gpu.md": ("benchmarks/on_gpu.json", gpu_page.text),
    "docs/benchmarks/local_step.md": ("benchmarks/local_step.json", step_page.text),
    "docs/benchmarks/many_units.md": ("benchmarks/many_units.json", many_units.page),
    "docs/benchmarks/scale.md": ("benchmarks/scale.json", scale_page.text),
    "docs/works-with.md": ("works-with.json", works_with),
}
CURVES = "reproduce/overlap_curve.jsonl"
STAGES = "contrastive-6-short"
PLACES = (
    Place("README.md", "examples/quickstart.py", "quickstart/seed-0.json", quickstart),
    Place("README.md", "examples/memory.py --arch resnet50", "memory/resnet50.json", steps),
    *(
        Place("docs/how-it-works.md", f"examples/memory.py --arch {arch}", f"memory/{arch}.json", steps)
        for arch in ("resnet50", "vit_b_16", "presnet50")
    ),
    Place("examples/README.md", "examples/quickstart.py --seed 0, 1, 2", "quickstart", quickstart_by_seed),
    Place("docs/diagnosis.md", "benchmarks/monitor.py", "diagnosis/monitor.json", monitor.table),
    Place("docs/infonce.md", "benchmarks/infonce.py", "benchmarks/infonce.json", infonce.half_precision),
    Place("docs/scaling.md", "benchmarks/scale.py", "benchmarks/scale.json", scale_page.summary),
    Place("docs/reproduce.md", "examples/overlap_curve.py", CURVES, markdown),
    Place("docs/reproduce.md", "examples/few_labels.py", "reproduce/few_labels.jsonl", few_labels),
    Place("docs/reproduce.md", "examples/detection/segment.py", "reproduce/segmentation.jsonl", segmentation),
    Place(
        "docs/reproduce.md", "examples/overlap_curve.py, every stage", CURVES, partial(markdown_of_stages, curve=STAGES)
    ),
)
PAGES = (*WHOLE, *dict.fromkeys(place.page for place in PLACES))


def record(name: str) -> Any:
    """What a file says, line by line where it has lines; all files of a folder in their names' order."""
    path = DOCS / name
    if path.is_dir():
        return [record(str(file.relative_to(DOCS))) for file in sorted(path.glob("*.json"))]
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(path.read_text())


def put(text: str, place: Place) -> str:
    """The page's text with the table that its record makes."""
    ends = re.compile(rf"^(<!-- {re.escape(place.mark)} -->\n).*?^(<!-- end -->)$", re.MULTILINE | re.DOTALL)
    table = place.text(record(place.record))
    text, count = ends.subn(lambda match: match[1] + table + match[2], text)
    if count != 1:
        raise ValueError(f"{place.page} needs one place from <!-- {place.mark} --> to <!-- end -->; it has {count}")
    return text


def made(page: str) -> str:
    """The text that a page should have."""
    if page in WHOLE:
        name, text = WHOLE[page]
        return text(record(name))
    text = (ROOT / page).read_text()
    for place in (place for place in PLACES if place.page == page):
        text = put(text, place)
    return text


def main() -> None:
    for page in PAGES:
        text = made(page)
        if (ROOT / page).read_text() != text:
            write(ROOT / page, lambda path, text=text: path.write_text(text))
            print(f"wrote {page}")


if __name__ == "__main__":
    main()
