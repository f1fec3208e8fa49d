"""overlap_curve.py's figure: accuracy against the memory of a step, a panel for each curve, a point for each overlap."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from curves.presets import BOTH, DEEP, FIRST, SOFT, START, UPPER
from curves.results import NAMES, Point, heading, is_pilot, points
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from drawing.charts import new_figure
from drawing.figure_style import FAINT, INK, METHODS, quiet

ACROSS = 2  # panels side by side
OTHERS = {BOTH: "D", UPPER: "s", DEEP: "^", SOFT: "v", FIRST: "P"}  # the marks of what is no single overlap


def draw_curves(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """`lines`: of results.jsonl; pilots, and curves of a single row, are drawn where there is nothing else."""
    found = points(lines)
    found = {name: rows for name, rows in found.items() if len(rows) > 1} or found
    curves = {name: rows for name, rows in found.items() if not is_pilot(name)} or found
    across = min(ACROSS, len(curves))
    down = -(-len(curves) // across)
    with new_figure(
        path, 6.4 * across, 0.9 + 4.3 * down, "What overlap buys: accuracy against the memory of a step"
    ) as figure:
        panels = figure.subplots(down, across, squeeze=False).flatten()
        for panel, (curve, rows) in zip(panels, curves.items(), strict=False):
            _panel(panel, rows)
            setting, _, rest = heading(lines, curve).partition("; ")
            panel.set_title(f"{setting.partition(': ')[2]}\n{rest}", fontsize=9, fontweight="normal")
        for panel in panels[len(curves) :]:
            panel.set_visible(False)
        end_to_end, others = METHODS["SimCLR"], METHODS["Greedy InfoMax"]
        rows = [row for rows in curves.values() for row in rows]
        drawn = {row.row for row in rows}
        key = [
            *(
                [Line2D([], [], color=METHODS["LoCo"], marker="o", label="one overlap")]
                if any(row.overlap is not None and not row.end_to_end for row in rows)
                else []
            ),
            *(
                Line2D([], [], color=others, marker=mark, linestyle="", label=NAMES[row])
                for row, mark in OTHERS.items()
                if row in drawn
            ),
        ]
        if any(row.end_to_end for row in rows):
            dot = {"color": end_to_end, "marker": "o", "linestyle": ""}
            key += [Line2D([], [], **dot, label="end to end")]
            key += [Line2D([], [], **dot, mfc="white", label="end to end, recomputed")]
        if START in drawn:
            key.append(Line2D([], [], color=FAINT, linestyle=(0, (4, 3)), label="random start"))
        figure.legend(handles=key, loc="outside lower left", ncols=4 if across > 1 else 2, frameon=False)


def _panel(panel: Axes, rows: Sequence[Point]) -> None:
    """Bars are standard deviations over seeds, the small dots the seeds."""
    single = [row for row in rows if row.overlap is not None]
    panel.plot([row.peak / 1e6 for row in single], [row.mean for row in single], color=METHODS["LoCo"], zorder=2)
    for row in rows:
        if row.row == START:
            panel.axhline(row.mean, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
            continue
        whole, other = row.end_to_end, row.row in OTHERS
        colour = METHODS["SimCLR" if whole else "Greedy InfoMax" if other else "LoCo"]
        mark = {"fmt": OTHERS.get(row.row, "o"), "color": colour, "markersize": 7, "capsize": 3, "zorder": 3}
        peak, seeds = row.peak / 1e6, list(row.accuracies.values())
        panel.errorbar(peak, row.mean, yerr=row.spread, **mark)
        panel.plot([peak] * len(seeds), seeds, ".", color=colour, markersize=4, alpha=0.5, markeredgewidth=0)
        if whole:
            panel.errorbar(row.peak_recomputed / 1e6, row.mean, yerr=row.spread, **mark, mfc="white")
        if not other:
            at = {"xytext": (-5, 7), "textcoords": "offset points", "fontsize": 9, "ha": "right"}
            panel.annotate(row.row, (peak, row.mean), color=INK, **at)
    panel.set_xlabel("peak memory of a step, MB")
    panel.set_ylabel("linear read-out, %")
    panel.set_xlim(left=0)
    panel.margins(x=0.1, y=0.12)
    quiet(panel)
