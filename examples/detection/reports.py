"""Average precision as a table beside the paper's, on the screen, as json and as markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command_line import write
from precision import FIGURES
from rich.box import SIMPLE_HEAVY
from rich.console import Console
from rich.table import Table

# box AP / mask AP of a ResNet-50, 800 epochs of pretraining where there was any
PAPER = {
    "COCO": {"simclr": "34.8/32.2", "gim": "29.3/27.0", "loco": "34.5/32.0", "supervised": "33.9/31.3"},
    "Cityscapes": {"simclr": "34.8/30.1", "gim": "30.7/26.0", "loco": "34.2/29.5", "supervised": "33.2/27.1"},
    "COCO-10K": {"simclr": "27.2/25.2", "gim": "24.4/22.4", "loco": "27.8/25.6", "supervised": "26.0/23.8"},
    "COCO-1K": {"simclr": "13.9/14.1", "gim": "11.5/11.7", "loco": "13.9/13.8", "supervised": "10.4/10.1"},
}  # Tables 2 and 3
PAPER["COCO-10K"]["random"], PAPER["COCO-1K"]["random"] = "23.5/22.0", "2.5/2.5"
METHODS = ("simclr", "gim", "loco", "supervised", "random")


def of_the_paper(row: dict[str, Any]) -> tuple[str, str]:
    """The paper's setting that is nearest to a row's, and its figures for the row's method, if it has any."""
    if row["mode"] == "frozen":
        setting = "Cityscapes" if "cityscapes" in row["data"] else "COCO"
    else:
        setting = "COCO-1K" if row["schedule"] == "coco-1k" else "COCO-10K"
    name = row["backbone"].lower().replace("imagenet1k", "supervised").replace("greedy infomax", "gim")
    method = next((method for method in METHODS if method in name), "")
    return setting, PAPER[setting].get(method, "")


def save_json(path: Path, results: Any) -> None:
    write(path, lambda unfinished: unfinished.write_text(json.dumps(results, indent=1) + "\n"))


def percent(value: float) -> str:
    """Of 0..1; COCO's -1 says that there is nothing of that size."""
    return f"{100 * value:.1f}" if value >= 0 else "-"


def print_results(rows: Sequence[dict[str, Any]]) -> None:
    """A line for boxes and one for masks, of each backbone."""
    first = rows[0]
    setting, _ = of_the_paper(first)
    table = Table(box=SIMPLE_HEAVY)
    table.add_column("backbone", no_wrap=True)
    table.add_column("", no_wrap=True)
    for figure in (*FIGURES, "paper"):
        table.add_column(figure, justify="right", no_wrap=True)
    for row in rows:
        _, published = of_the_paper(row)
        for kind, figure in zip(("box", "mask"), published.split("/") if published else ("", ""), strict=True):
            name = row["backbone"] if kind == "box" else ""
            table.add_row(name, kind, *(percent(row[kind][figure]) for figure in FIGURES), figure)
    console = Console()
    console.print(f"Mask R-CNN, {first['mode']}, on {first['images']} images of {first['data']}", style="bold")
    console.print(table)
    console.print(f"In %. The paper's are AP of a ResNet-50 on {setting}.", style="dim", highlight=False)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The mean of the rows of each backbone, over their seeds, with the standard deviation where there are several."""
    setting, _ = of_the_paper(rows[0])
    lines = [
        f"| backbone | box AP | AP50 | AP75 | mask AP | AP50 | AP75 | paper: R-50, {setting} |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in dict.fromkeys(row["backbone"] for row in rows):
        same = [row for row in rows if row["backbone"] == name]
        cells = [_mean([row[kind][figure] for row in same]) for kind in ("box", "mask") for figure in FIGURES[:3]]
        lines.append(f"| {name} | {' | '.join(cells)} | {of_the_paper(same[0])[1]} |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{100 * mean:.2f}"
    std = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return f"{100 * mean:.2f} ± {100 * std:.2f}"
