"""A scatter of memory against time, one point per way to train, with the front of those that nothing beats in both."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from drawing.figure_style import FAINT, GRID, INK, METHODS, STYLE


class Point(NamedTuple):
    """`family`: a method of `figure_style.METHODS`; what does not `compete` is drawn, but never on the front."""

    name: str
    family: str
    time: float
    memory: float
    competes: bool = True


def front(points: Sequence[Point]) -> list[Point]:
    """Those than which none is better in one and at least as good in the other, from the fastest on."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.time, point.memory)):
        if point.competes and (not best or point.memory < best[-1].memory):
            best.append(point)
    return best


def draw(points: Sequence[Point], title: str, path: Path) -> None:
    """Time and memory are relative to end-to-end training."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 5.6), layout="constrained", facecolor="white")
        panel = figure.subplots()
        corners = front(points)
        steps = zip(*[(point.time, point.memory) for point in corners], strict=True)
        panel.plot(*steps, color=FAINT, linewidth=1, drawstyle="steps-post", zorder=1)
        panel.set_yscale("log", base=2)
        panel.margins(x=0.18, y=0.12)
        for point in points:
            on_front = point in corners
            panel.scatter(
                point.time,
                point.memory,
                s=70,
                color=METHODS[point.family] if on_front else "white",
                edgecolors=METHODS[point.family],
                linewidths=1.6,
                zorder=2,
            )
        panel.axhline(1, color=GRID, zorder=0)
        panel.axvline(1, color=GRID, zorder=0)
        panel.set_yticks([1, 0.5, 0.25, 0.125], ["1", "1/2", "1/4", "1/8"])
        panel.minorticks_off()
        panel.set_xlabel("time per step, end-to-end = 1")
        panel.set_ylabel("peak of live bytes, end-to-end = 1")
        panel.set_title(title)
        for family in dict.fromkeys(point.family for point in points):
            panel.scatter([], [], s=70, color=METHODS[family], label=family)
        panel.legend(frameon=False, loc="upper right", title="filled: nothing is better in both", alignment="left")
        figure.draw_without_rendering()  # from here on points keep their places, so that labels can be kept apart
        _label(panel, points, corners)
        figure.savefig(path, format="png", dpi=130)


def _label(panel: Axes, points: Sequence[Point], corners: Sequence[Point]) -> None:
    """Names to the right of their points, pushed down past labels that they would cover."""
    scale = 72 / panel.figure.dpi
    at = {point: [scale * value for value in panel.transData.transform(point[2:4])] for point in points}
    placed = [(x - 5, x + 5, y) for x, y in at.values()]  # left, right, height; in points of type
    for point in sorted(points, key=lambda point: -point.memory):
        x, y = at[point]
        left, right, height = x + 7, x + 7 + 5.2 * len(point.name), y
        while any(left < end and begin < right and abs(taken - height) < 10 for begin, end, taken in placed):
            height -= 2
        placed.append((left, right, height))
        panel.annotate(
            point.name,
            (point.time, point.memory),
            xytext=(7, height - y),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK if point in corners else FAINT,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
