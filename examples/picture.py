"""The quickstart's picture: what the methods saw, how each unit's loss fell, and the table as bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from figure_style import FAINT, GRID, INK, METHODS, STYLE
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

# column of the table -> its title and unit, how a value is written, and what makes it readable as a number
ACCURACIES = {"probe_accuracy": "linear probe, %", "knn_accuracy": "kNN, %"}
COSTS = {
    "peak_activation_bytes": ("peak activations, MB", "{:.1f}", 1e-6),
    "ms_per_step": ("time per step, ms", "{:.0f}", 1),
    "step_flops_relative": ("FLOPs, SimCLR = 1", "{:.2f}", 1),
}


def draw(summary: dict[str, Any], samples: Sequence[Tensor], path: Path) -> None:
    """Draw results.json's `summary`, and `samples`: images (uint8) and two views of them (-1..1), `(N, C, S, S)` each."""
    with rc_context(STYLE):
        figure = Figure(figsize=(14, 9), layout="constrained", facecolor="white")
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.1)
        above, below = figure.subfigures(2, 1, height_ratios=(1.6, 1))
        grid = above.add_gridspec(2, 4, width_ratios=(0.66, 1, 1, 1), height_ratios=(0.34, 1))
        _samples(above.add_subplot(grid[:, 0]), samples)
        plans, losses = ([above.add_subplot(grid[row, column]) for column in (1, 2, 3)] for row in (0, 1))
        _losses(plans, losses, summary)
        panels = below.subplots(1, len(ACCURACIES) + len(COSTS), sharey=True)
        _accuracies(panels[: len(ACCURACIES)], summary)
        _costs(panels[len(ACCURACIES) :], summary)
        settings, images = summary["settings"], summary["images"]
        figure.suptitle(
            f"One backbone, one decoder, three reaches of the loss: {images['name']}, {images['train']:,} images, "
            f"{settings['epochs']} epochs of batch {settings['batch_size']}, seed {settings['seed']}",
            x=0.012,
            ha="left",
            fontsize=14,
            fontweight="bold",
        )
        figure.savefig(path, format="png", dpi=130)


def _samples(panel: Axes, samples: Sequence[Tensor]) -> None:
    images, *views = samples
    columns = [images.float() / 255, *[(view + 1) / 2 for view in views]]
    frame = max(1, images.shape[-1] // 12)
    framed = np.pad(
        np.stack([rearrange(c.cpu().numpy(), "n c h w -> n h w c") for c in columns], axis=1),
        [(0, 0), (0, 0), (0, frame), (0, frame), (0, 0)],
        constant_values=1,
    )
    panel.imshow(rearrange(framed, "n v h w c -> (n h) (v w) c"), cmap="gray", vmin=0, vmax=1)
    width = framed.shape[3]
    panel.set_xticks([width * (i + 0.5) - frame for i in range(3)], ["image", "view 1", "view 2"])
    panel.tick_params(length=0)
    panel.set_yticks([])
    panel.spines[:].set_visible(False)
    panel.set_title("what the methods see")


def _losses(plans: Sequence[Axes], panels: Sequence[Axes], summary: dict[str, Any]) -> None:
    stages = 1 + max(last for units in summary["units"].values() for _, last in units)
    shades = colormaps["viridis"](np.linspace(0, 0.9, stages))
    chance = np.log(2 * summary["settings"]["batch_size"] - 1)
    for plan, panel, name in zip(plans, panels, ("SimCLR", "Greedy InfoMax", "LoCo"), strict=True):
        units, curves = summary["units"][name], np.array(summary["losses"][name])
        _plan(plan, units, stages, shades)
        plan.set_title(f"{name}: {len(units)} {'unit' if len(units) == 1 else 'units'}", color=METHODS[name])
        epochs = np.arange(1, len(curves) + 1)
        for (_, last), curve in zip(units, curves.T, strict=True):
            panel.plot(epochs, curve, color=shades[last], linewidth=2, marker="o" if len(epochs) == 1 else None)
        panel.axhline(chance, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(axis="y", color=GRID)
        panel.set_axisbelow(True)
        panel.sharey(panels[0])
    least = min(np.min(summary["losses"][name]) for name in ("SimCLR", "Greedy InfoMax", "LoCo"))
    panels[0].set_ylim(np.floor(least), chance * 1.06)
    panels[0].set_ylabel("InfoNCE of each unit, mean of an epoch")
    at_chance = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom", "color": FAINT, "fontsize": 8.5}
    panels[0].annotate("guessing", (0.99, chance), **at_chance)


def _plan(panel: Axes, units: Sequence[Sequence[int]], stages: int, shades: np.ndarray) -> None:
    """The plan's drawing, and the legend of the losses: a bar for each unit, over the stages that its loss reaches."""
    for row, (first, last) in enumerate(units):
        bar = FancyBboxPatch((first + 0.04, row + 0.12), last - first + 0.92, 0.76, "round,pad=0,rounding_size=0.1")
        bar.set(facecolor=shades[last], edgecolor="none")
        panel.add_patch(bar)
    panel.set(xlim=(0, stages), ylim=(max(stages, len(units)), 0), yticks=[])
    panel.set_xticks([s + 0.5 for s in range(stages)], [str(s) for s in range(stages)], fontsize=8.5)
    panel.tick_params(length=0, pad=2)
    panel.spines[:].set_visible(False)
    panel.vlines(range(stages + 1), 0, stages, color=GRID, linewidth=1, zorder=0)
    panel.set_xlabel("stages that each loss reaches", fontsize=8.5, color=FAINT, labelpad=1)


def _accuracies(panels: Sequence[Axes], summary: dict[str, Any]) -> None:
    rows, n = summary["table"], summary["images"]["test"]
    for panel, (column, title) in zip(panels, ACCURACIES.items(), strict=True):
        for place, row in enumerate(rows):
            p, colour = row[column], METHODS[row["method"]]
            error = 100 * (p * (1 - p) / n) ** 0.5
            panel.errorbar(100 * p, place, xerr=error, fmt="o", markersize=9, elinewidth=2.5, color=colour)
            _label(panel, f"{100 * p:.1f}", 100 * p, place, above=True)
        panel.set_title(title)
        panel.grid(axis="x", color=GRID)
        panel.tick_params(left=False)
    panels[0].set_yticks(range(len(rows)), [row["method"] for row in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.6)
    panels[0].set_xlabel("held out; bars: standard error", fontsize=8.5, color=FAINT)


def _costs(panels: Sequence[Axes], summary: dict[str, Any]) -> None:
    rows = summary["table"]
    for panel, (column, (title, form, scale)) in zip(panels, COSTS.items(), strict=True):
        for place, row in enumerate(rows):
            if row[column] is None:
                _label(panel, "not trained", 0, place, color=FAINT)
                continue
            value = row[column] * scale
            panel.barh(place, value, color=METHODS[row["method"]], height=0.62)
            _label(panel, form.format(value), value, place)
        panel.set_title(title)
        panel.margins(x=0.2)
        panel.spines["bottom"].set_visible(False)
        panel.tick_params(left=False, bottom=False, labelbottom=False)


def _label(panel: Axes, text: str, x: float, y: float, above: bool = False, color: str = INK) -> None:
    offset, ha, va = ((0, 7), "center", "bottom") if above else ((6, 0), "left", "center")
    panel.annotate(text, (x, y), xytext=offset, textcoords="offset points", ha=ha, va=va, color=color, fontsize=9.5)
