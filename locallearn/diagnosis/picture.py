"""An empty picture for matplotlib, which only those need who want one."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
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
    figure = _figure(who)(figsize=size, layout="constrained")
    if asked:
        figure.suptitle(asked, x=0.01, horizontalalignment="left", fontweight="bold")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def colour(number: int) -> str:
    """Of a unit or a stage, the same in all pictures."""
    return COLOURS[number % len(COLOURS)]


def checked(who: str, path: str | PathLike[str]) -> Path:
    """``path``, where a picture can be written to it; its folder is made.

    Raises:
        ModuleNotFoundError: without matplotlib; it says what ``who`` needs.
        ValueError: if matplotlib has no such format.
        OSError: if the folder cannot be made.
    """
    to, formats = Path(path), sorted(_figure(who)().canvas.get_supported_filetypes())
    if to.suffix[1:].lower() not in formats:
        given = f"of the format {to.suffix!r}" if to.suffix else "without a suffix that says which"
        raise ValueError(f"a picture is {', '.join(formats[:-1])} or {formats[-1]}; got {str(path)!r}, {given}")
    to.parent.mkdir(parents=True, exist_ok=True)
    return to


def write(figure: Figure, who: str, path: str | PathLike[str]) -> None:
    """Saves ``figure``; its folder is made.

    Raises:
        ValueError: if matplotlib has no such format.
    """
    figure.savefig(checked(who, path), dpi=150)


def _figure(who: str) -> type[Figure]:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - only who wants a picture needs it
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{who} draws with matplotlib, which is not installed: pip install matplotlib"
        ) from error
    return Figure
