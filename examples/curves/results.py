"""What overlap_curve.py's lines of results say together: mean and spread over seeds, differences seed by seed, a table."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

from rich.box import SIMPLE_HEAVY
from rich.console import Console
from rich.table import Table
from scipy.stats import t

from curves.presets import BOTH, DEEP, FIRST, PRESETS, SOFT, START, UPPER

GREEDY = "0"
WIDE = 130  # characters of a terminal that shows every column
LEFT_OUT = ("largest batch", "GFLOP", "ms")  # on a narrower one, as single seeds are
NAMES = {
    START: "random start",
    BOTH: "0 and 1 together",
    UPPER: "1, upper only",
    DEEP: "all reach down",
    SOFT: "1, soft (1e-3)",
    FIRST: "1, first blocks",
}


@dataclass(frozen=True)
class Point:
    """A row of a curve: what all its seeds reach, in %, and what its step costs."""

    curve: str
    row: str
    overlap: int | None  # None: untrained, or not one overlap alone
    stages: int
    units: int
    accuracies: dict[int, float]  # by seed
    batch_size: int
    peak: int  # bytes
    peak_per_image: float
    peak_recomputed: int
    flops: int
    step_ms: float | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies.values())

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; None for a single one."""
        return statistics.stdev(self.accuracies.values()) if len(self.accuracies) > 1 else None

    @property
    def end_to_end(self) -> bool:
        return self.overlap == self.stages - 1

    @property
    def name(self) -> str:
        return row_name(self.row, self.stages)


def row_name(row: str, stages: int) -> str:
    """What tables call a row: its overlap, with a note at both ends, or what it is instead."""
    if row in NAMES:
        return NAMES[row]
    note = " (greedy)" if row == GREEDY else " (end to end)" if row == str(stages - 1) else ""
    return f"{row}{note}"


def points(lines: Sequence[dict[str, Any]]) -> dict[str, list[Point]]:
    """By curve, as the presets list them, pilots last; each from the random start to end to end, then what is no overlap."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    times = {(line["curve"], line["row"]): line["step_ms"] for line in lines if "step_ms" in line}
    for line in lines:
        if "accuracy" in line:
            found.setdefault((line["curve"], line["row"]), []).append(line)
    curves: dict[str, list[Point]] = {}
    for (curve, row), runs in found.items():
        one = runs[0]
        point = Point(
            curve,
            row,
            int(row) if row.isdigit() else None,
            len(one["stages"]),
            len(one["units"]),
            {run["seed"]: 100 * run["accuracy"] for run in sorted(runs, key=lambda run: run["seed"])},
            one["batch_size"],
            one["peak_bytes"],
            one["peak_bytes_per_image"],
            one["peak_bytes_recomputed"],
            one["flops"],
            times.get((curve, row)),
        )
        curves.setdefault(curve, []).append(point)
    for rows in curves.values():
        rows.sort(key=lambda point: (point.row != START, point.overlap is None, point.overlap or 0, point.row))
    listed = [curve.name for preset in PRESETS.values() for curve in preset]
    places = {name: (is_pilot(name), listed.index(name) if name in listed else len(listed), name) for name in curves}
    return {name: curves[name] for name in sorted(curves, key=places.__getitem__)}


def is_pilot(curve: str) -> bool:
    return curve.startswith("pilot-")


def difference(ours: Point, base: Point) -> tuple[float, float | None] | None:
    """How much more than `base` on average over the seeds that both have, and half of its 95 % interval (paired t test).

    None without a common seed; no interval with a single one.
    """
    seeds = ours.accuracies.keys() & base.accuracies.keys()
    more = [ours.accuracies[seed] - base.accuracies[seed] for seed in sorted(seeds)]
    if not more:
        return None
    if len(more) == 1:
        return more[0], None
    half = t.ppf(0.975, len(more) - 1) * statistics.stdev(more) / len(more) ** 0.5
    return statistics.fmean(more), float(half)


def mean_and_spread(values: Collection[float]) -> str:
    """The mean ± the standard deviation, which a single value has not."""
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def batch_in(budget: int, point: Point) -> int:
    """How many images a step may have whose peak stays within `budget` bytes: it grows with them in a straight line."""
    return point.batch_size + int((budget - point.peak) // point.peak_per_image)


def cells(rows: Sequence[Point], narrow: bool = False) -> tuple[list[str], list[list[str]]]:
    """A curve's table: headings, and a line per row; `narrow` leaves out single seeds and `LEFT_OUT`."""
    seeds = sorted({seed for row in rows for seed in row.accuracies})
    greedy = next((row for row in rows if row.row == GREEDY), None)
    whole = next((row for row in rows if row.end_to_end and row.row != START), None)
    headings = ["overlap", "units", *(f"seed {seed}" for seed in seeds), "mean", "more than greedy, 95 %"]
    timed = any(row.step_ms is not None for row in rows)
    headings += ["peak, MB", "recomputed, MB", "largest batch", "GFLOP", *(["ms"] if timed else [])]
    lines = []
    for row in rows:
        trained = row.row != START
        line = [row.name, str(row.units) if trained else ""]
        line += [f"{row.accuracies[seed]:.1f}" if seed in row.accuracies else "" for seed in seeds]
        line.append(mean_and_spread(row.accuracies.values()))
        more = difference(row, greedy) if greedy and trained and row is not greedy else None
        line.append("" if more is None else f"{more[0]:+.1f}" + ("" if more[1] is None else f" ± {more[1]:.1f}"))
        line += [f"{row.peak / 1e6:.0f}", f"{row.peak_recomputed / 1e6:.0f}"] if trained else ["", ""]
        line.append(str(batch_in(whole.peak, row)) if trained and whole else "")
        line.append(f"{row.flops / 1e9:.0f}" if trained else "")
        if timed:
            line.append("" if row.step_ms is None else f"{row.step_ms:.0f}")
        lines.append(line)
    if narrow:
        kept = [not (name.startswith("seed ") or name in LEFT_OUT) for name in headings]
        headings, *lines = ([*compress(line, kept)] for line in (headings, *lines))
    return headings, lines


def heading(lines: Sequence[dict[str, Any]], curve: str) -> str:
    """What a curve's rows share, in a sentence."""
    one = next(line for line in lines if line["curve"] == curve and "accuracy" in line)
    return (
        f"{curve}: {one['arch']} in {len(one['stages'])} stages, {one['task']}, {one['decoder']} decoders; "
        f"{one['images']:,} images of {one['data']}, {one['epochs']} epochs of batch {one['batch_size']}"
    )


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """All curves' tables."""
    text = []
    for curve, rows in points(lines).items():
        headings, body = cells(rows)
        text += [f"**{heading(lines, curve)}**", ""]
        text += [f"| {' | '.join(headings)} |", f"|---|{'--:|' * (len(headings) - 1)}"]
        text += [*(f"| {' | '.join(line)} |" for line in body), ""]
    return "\n".join(text)


def markdown_of_stages(lines: Sequence[dict[str, Any]], curve: str) -> str:
    """The read-out of every stage in a curve's rows."""
    found: dict[str, list[list[float]]] = {row.name: [] for row in points(lines)[curve]}
    for line in lines:
        if line["curve"] == curve and "accuracy" in line:
            found[row_name(line["row"], len(line["stages"]))].append(line["stages_accuracy"])
    return table_of_stages(found)


def table_of_stages(found: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Per cent of every stage, mean and standard deviation over a row's runs; `found` has shares in 0..1, run by run."""
    count = len(next(iter(found.values()))[0])
    text = [f"| overlap | {' | '.join(f'stage {stage + 1}' for stage in range(count))} |", f"|---|{'--:|' * count}"]
    for name, runs in found.items():
        by_stage = [mean_and_spread([100 * share for share in stage]) for stage in zip(*runs, strict=True)]
        text.append(f"| {name} | {' | '.join(by_stage)} |")
    return "\n".join([*text, ""])


def show(lines: Sequence[dict[str, Any]]) -> None:
    """The same, in the terminal."""
    console, shown = Console(), set()
    narrow = console.width < WIDE
    for curve, rows in points(lines).items():
        headings, body = cells(rows, narrow)
        shown.update(headings)
        table = Table(title=heading(lines, curve), title_justify="left", box=SIMPLE_HEAVY, padding=(0, 1, 0, 0))
        for place, name in enumerate(headings):
            table.add_column(name.replace(", ", ",\n"), justify="right" if place else "left", no_wrap=True)
        for line in body:
            table.add_row(*line)
        console.print(table)
    held_out = sorted({line["held_out"] for line in lines if "accuracy" in line})
    console.print(legend(held_out, shown, narrow), style="dim", highlight=False)


def legend(held_out: Sequence[int], shown: Collection[str], narrow: bool) -> str:
    """What the columns that are shown mean."""
    top_stage = (
        f"Linear read-out of the top stage on {' or '.join(map(str, held_out))} held-out images, %; ± standard deviation over "
        "seeds, and half of the 95 % interval of the difference seed by seed. Peak: counted bytes of a step beside weights and "
        "gradients; recomputed: with checkpoint=True, whose accuracy is the same."
    )
    text = [top_stage]
    if "largest batch" in shown:
        text.append("Largest batch: in the peak of end to end.")
    if of_a_step := [name for name in ("GFLOP", "ms") if name in shown]:
        text.append(f"{' and '.join(of_a_step)}: of a step.")
    if narrow:
        text.append("overlap_curve.md has every column.")
    return " ".join(text)
