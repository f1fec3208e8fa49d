"""An empty picture for matplotlib, which only those need who want one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#4477aa", "#ee8866", "#228833", "#aa3377", "#66ccee", "#bbaa33", "#7a7f8c", "#22303c")


def panels(who: str, asked: str, *, count: int = 1, size: tuple[float, float] = (9, 4)) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels beside each other, whose title is the question that it answers.

    Raises:
        ModuleNotFoundError: without matplotlib; it says what ``who`` needs.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - only who wants a picture needs it
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{who} draws with matplotlib, which is not installed: pip install matplotlib"
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    if asked:
        figure.suptitle(asked, x=0.01, horizontalalignment="left", fontweight="bold")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def colour(number: int) -> str:
    """Of a unit or a stage, the same in all pictures."""
    return COLOURS[number % len(COLOURS)]
