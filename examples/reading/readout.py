"""What the read-outs share: the file that they write, the table that they print."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command_line import write
from inputs.image_sets import Folder, Images
from rich.box import SIMPLE_HEAVY
from rich.console import Console
from rich.table import Table


def file_name(*parts: str) -> str:
    """Of a read-out: by what, on which data, of which checkpoint; an empty part is left out."""
    return "-".join(re.sub(r"[^\w.-]+", "_", part) for part in parts if part) + ".json"


def save(path: Path, results: dict[str, Any]) -> None:
    """Older results of that name, where they differ, stay beside it: the first as PATH.1, the next as PATH.2, and so on."""
    text = json.dumps(results, indent=1) + "\n"
    if path.is_file() and path.read_text() != text:
        number = 1
        while (older := path.with_name(f"{path.name}.{number}")).exists():
            number += 1
        path.replace(older)
        print(f"kept the older results as {older}")
    write(path, lambda unfinished: unfinished.write_text(text))
    print(f"wrote {path}")


def show(title: str, stages: Sequence[str], columns: dict[str, Sequence[float]], images: Images | Folder) -> None:
    """`columns`: heading -> accuracy in 0..1 of each stage, from the first to the top one."""
    count = len(images.test_labels)
    table = Table(box=SIMPLE_HEAVY)
    table.add_column("stage", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for stage, *accuracies in zip(stages, *columns.values(), strict=True):
        errors = [100 * (p * (1 - p) / count) ** 0.5 for p in accuracies]
        table.add_row(stage, *(f"{100 * p:.1f} ± {error:.1f}" for p, error in zip(accuracies, errors, strict=True)))
    console = Console()
    console.print(title, style="bold", highlight=False)
    console.print(table)
    console.print(
        f"On {count} held-out images of {images.classes} classes, ± standard error.", style="dim", highlight=False
    )
