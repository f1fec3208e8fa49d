"""How the examples' figures look: colours, type, and labels at the ends of lines."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

INK, FAINT, GRID = "#22303c", "#8a97a3", "#e6eaee"
METHODS = {
    "random start": "#c3cad1",
    "SimCLR": "#4477aa",
    "Greedy InfoMax": "#ee8866",
    "LoCo": "#228833",
    "supervised": "#7a7f8c",
}
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def quiet(panel: Axes, axis: str = "y") -> None:
    """A faint grid across the values, behind what is drawn."""
    panel.grid(axis=axis, color=GRID)
    panel.set_axisbelow(True)
    panel.tick_params(length=0)


def label_ends(
    panel: Axes, texts: Sequence[str], ends: Sequence[tuple[float, float]], colours: Sequence[object]
) -> None:
    """Write each line's name beside its last point, moved apart where they would overlap. The limits must be final."""
    low, high = panel.get_ylim()
    gap = (high - low) * 0.055
    order = sorted(range(len(ends)), key=lambda i: ends[i][1])
    places = [ends[i][1] for i in order]
    for _ in range(100):  # push neighbours apart until none overlap
        for k in range(len(places) - 1):
            if (overlap := gap - (places[k + 1] - places[k])) > 1e-9:
                places[k] -= overlap / 2
                places[k + 1] += overlap / 2
    for i, y in zip(order, places, strict=True):
        at = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        panel.annotate(texts[i], (ends[i][0], y), color=colours[i], fontsize=9, **at)
