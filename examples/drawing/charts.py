"""The drawings of figures.py: rows of a CSV in, a PNG out."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from drawing.figure_style import FAINT, GRID, INK, METHODS, STYLE, label_ends, quiet

LINES = ("-", (0, (5, 2)), (0, (1, 1.5)))  # of a method's variants


@dataclass(frozen=True)
class Loss:
    """A unit's loss at a step; the unit reaches the stages from `first` to `last`."""

    method: str
    run: str
    seed: int | None
    unit: int
    first: int
    last: int
    step: int
    epoch: float
    loss: float


@dataclass(frozen=True)
class Point:
    """An image in the plane."""

    method: str
    run: str
    label: int
    name: str
    x: float
    y: float


@dataclass(frozen=True)
class Saving:
    """How many times less memory than end-to-end SimCLR a training step takes."""

    arch: str
    method: str
    peak: float
    saved: float
    in_paper: float | None


@dataclass(frozen=True)
class Reading:
    """A stage's accuracy in 0..1, of one run."""

    method: str
    run: str
    seed: int | None
    depth: int
    stage: str
    accuracy: float


@contextmanager
def new_figure(path: Path, width: float, height: float, title: str) -> Iterator[Figure]:
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
        figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
        yield figure
        figure.savefig(path, format="png", dpi=130)


def colour_of(method: str) -> str:
    """Of the paper's methods their own, whatever else their name says."""
    return METHODS.get(method.split(",", maxsplit=1)[0], INK)


def of_runs(rows: Sequence[Loss] | Sequence[Reading]) -> str:
    """How many runs a line is the mean of, for a title."""
    counts = {len({row.run for row in rows if row.method == method}) for method in {row.method for row in rows}}
    if counts == {1}:
        return ""
    return f", mean of {min(counts)}" + (f" to {max(counts)}" if len(counts) > 1 else "") + " runs"


def in_order(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


# ------------------------------------------------------------------------------------------------------------ Figure 2


def draw_losses(rows: Sequence[Loss], path: Path) -> None:
    """A panel per method, a line per decoder, by its depth; end-to-end training's line is repeated in the other panels."""
    methods = in_order([row.method for row in rows])
    shades = colormaps["viridis"](np.linspace(0, 0.8, 1 + max(row.last for row in rows)))
    end_to_end = next((m for m in methods if len({row.unit for row in rows if row.method == m}) == 1), None)
    with new_figure(path, 1 + 4.2 * len(methods), 4.4, f"Loss of every decoder over training{of_runs(rows)}") as figure:
        panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
        labels = []
        for panel, method in zip(panels, methods, strict=True):
            own = [row for row in rows if row.method == method]
            texts, ends, colours = [], [], []
            for unit, first, last in sorted({(row.unit, row.first, row.last) for row in own}):
                epochs, means = mean_curve([row for row in own if row.unit == unit])
                smoothed = smooth(means)
                mark = "o" if len(epochs) == 1 else ""  # a line needs two points
                panel.plot(epochs, means, color=shades[last], linewidth=0.8, alpha=0.25)
                panel.plot(epochs, smoothed, color=shades[last], linewidth=2, marker=mark)
                texts.append(f"stage {last}" if first == last else f"stages {first} to {last}")
                ends.append((epochs[-1], smoothed[-1]))
                colours.append(shades[last])
            if end_to_end not in (None, method):
                epochs, means = mean_curve([row for row in rows if row.method == end_to_end])
                smoothed = smooth(means)
                mark = "o" if len(epochs) == 1 else ""
                panel.plot(epochs, smoothed, color=INK, linewidth=1.2, linestyle=(0, (4, 2)), marker=mark, mfc="none")
                texts.append(end_to_end)
                ends.append((epochs[-1], smoothed[-1]))
                colours.append(INK)
            labels.append((texts, ends, colours))
            panel.set_title(method, color=colour_of(method))
            panel.set_xlabel("epoch")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.margins(x=0.02)
            quiet(panel)
        panels[0].set_ylabel("contrastive loss")
        for panel, (texts, ends, colours) in zip(panels, labels, strict=True):
            label_ends(panel, texts, ends, colours)


def mean_curve(rows: Sequence[Loss]) -> tuple[list[float], list[float]]:
    """Epochs that all runs have come to, and the loss at each, averaged over runs."""
    by_epoch: dict[float, list[float]] = {}
    for row in rows:
        by_epoch.setdefault(row.epoch, []).append(row.loss)
    most = max(map(len, by_epoch.values()))
    common = sorted(epoch for epoch, losses in by_epoch.items() if len(losses) == most)
    return common, [statistics.fmean(by_epoch[epoch]) for epoch in common]


def smooth(values: Sequence[float]) -> list[float]:
    """The mean of the last fortieth of the curve at every point."""
    window = max(1, len(values) // 40)
    return [statistics.fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


# ------------------------------------------------------------------------------------------------------------ Figure 3


def draw_tsne(points: Sequence[Point], path: Path) -> None:
    """A panel per run, a colour per class."""
    runs = in_order([point.run for point in points])
    classes = dict(sorted({point.label: point.name for point in points}.items()))
    shades = colormaps["tab10" if len(classes) <= 10 else "tab20"].colors
    with new_figure(path, 1.4 + 3.8 * len(runs), 4.6, "The encoder's vectors of held-out images, by t-SNE") as figure:
        panels = figure.subplots(1, len(runs), squeeze=False)[0]
        for panel, run in zip(panels, runs, strict=True):
            own = [point for point in points if point.run == run]
            for place, (label, name) in enumerate(classes.items()):
                at = np.array([(point.x, point.y) for point in own if point.label == label])
                colour = shades[place % len(shades)]
                panel.scatter(*at.T, s=18, color=colour, edgecolors="white", linewidths=0.4, label=name)
            panel.set_title(own[0].method, color=colour_of(own[0].method))
            panel.set_box_aspect(1)
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set(visible=True, color=GRID)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right center", frameon=False, markerscale=1.6, handletextpad=0.2)


# ------------------------------------------------------------------------------------------------------------- Table 7


def draw_memory(rows: Sequence[Saving], path: Path) -> None:
    """A panel per backbone, two bars per training: by all bytes alive, and by those kept for a backward."""
    archs = in_order([row.arch for row in rows])
    most = max(sum(row.arch == arch for row in rows) for arch in archs)
    title = "Memory of a step: times less than end-to-end SimCLR"
    with new_figure(path, 1 + 6 * len(archs), 1.9 + 0.52 * most, title) as figure:
        panels = figure.subplots(1, len(archs), squeeze=False)[0]
        for panel, arch in zip(panels, archs, strict=True):
            own = [row for row in rows if row.arch == arch]
            for place, row in enumerate(own):
                colour = training_colour(row.method)
                panel.barh(place - 0.19, row.peak, 0.36, color=colour)
                panel.barh(place + 0.19, row.saved, 0.36, color=colour, alpha=0.45)
                for y, value in ((place - 0.19, row.peak), (place + 0.19, row.saved)):
                    at = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8.5}
                    panel.annotate(f"{value:.2f}", (max(value, row.in_paper or 0), y), **at)
                if row.in_paper is not None:
                    panel.vlines(row.in_paper, place - 0.42, place + 0.42, color=INK, linewidth=2)
            panel.set_yticks(range(len(own)), [row.method.replace("`", "") for row in own])
            panel.set_ylim(most - 0.4, -0.6)
            panel.axvline(1, color=FAINT, linewidth=1, zorder=0)
            panel.set_title(arch)
            panel.margins(x=0.12)
            panel.set_xlim(left=0)
            quiet(panel, "x")
        key = [
            Patch(color=FAINT, label="peak of all bytes alive"),
            Patch(color=FAINT, alpha=0.45, label="kept for a backward"),
        ]
        if any(row.in_paper is not None for row in rows):
            key.append(Line2D([], [], color=INK, linewidth=2, label="in the paper"))
        figure.legend(handles=key, loc="outside lower left", ncols=3, frameon=False)


def training_colour(name: str) -> str:
    """Of a row of memory.py: by the first of the methods that it names."""
    return next((colour for method, colour in METHODS.items() if method in name), FAINT)


# ---------------------------------------------------------------------------------------------------------- probe curves


def draw_stages(readings: Sequence[Reading], measure: str, path: Path) -> None:
    """A line per method over the stages: the mean of its runs, each run as a point, their standard deviation as a band."""
    methods = in_order([reading.method for reading in readings])
    stages = {reading.depth: reading.stage for reading in sorted(readings, key=lambda reading: reading.depth)}
    with new_figure(path, 7.6, 4.8, f"Read-out along the depth{of_runs(readings)}") as figure:
        panel = figure.subplots()
        ends, seen = [], dict.fromkeys(METHODS, 0)
        for method in methods:
            own = [reading for reading in readings if reading.method == method]
            depths = sorted({reading.depth for reading in own})
            values = [[100 * reading.accuracy for reading in own if reading.depth == depth] for depth in depths]
            means = [statistics.fmean(value) for value in values]
            spread = np.array([statistics.stdev(value) if len(value) > 1 else 0.0 for value in values])
            colour, base = colour_of(method), method.split(",")[0]
            panel.fill_between(depths, means - spread, means + spread, color=colour, alpha=0.15, linewidth=0)
            panel.plot(depths, means, color=colour, linewidth=2, linestyle=LINES[seen.get(base, 0) % len(LINES)])
            seen[base] = seen.get(base, 0) + 1
            for depth, value in zip(depths, values, strict=True):
                panel.plot([depth] * len(value), value, "o", color=colour, markersize=4, alpha=0.6, markeredgewidth=0)
            ends.append((depths[-1], means[-1]))
        panel.set_xticks(list(stages), list(stages.values()))
        panel.set_xlabel("read out after")
        panel.set_ylabel(measure)
        panel.margins(x=0.04)
        quiet(panel)
        label_ends(panel, methods, ends, [colour_of(method) for method in methods])
