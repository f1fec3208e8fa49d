"""Where to cut? What every place of a backbone keeps and computes, as bars, with the stages in colours."""

from __future__ import annotations

from locallearn.diagnosis.picture import colour, panels, write
from locallearn.memory import StagePlan


def draw_cuts(path: str, name: str, plan: StagePlan) -> None:
    """Draws the pieces of ``plan``, from the images at the top down; its stages, where there are several, in colours.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    pieces = [(stage, piece) for stage, inside in enumerate(plan.pieces) for piece in inside]
    several = len(plan.pieces) > 1
    size = (10, 1.6 + 0.22 * max(8, len(pieces)))
    figure, (left, right) = panels("--save", f"Where to cut {name}?", count=2, size=size)
    at = range(len(pieces))
    total = sum(piece.flops for _, piece in pieces) or 1
    for panel, values in (
        (left, [piece.kept / 1e6 for _, piece in pieces]),
        (right, [100 * piece.flops / total for _, piece in pieces]),
    ):
        panel.barh(at, values, color=[colour(stage) for stage, _ in pieces], height=0.75)
        for number in at:
            if several and number and pieces[number][0] != pieces[number - 1][0]:
                panel.axhline(number - 0.5, color="0.3", linewidth=0.8, linestyle="--")
        panel.set(ylim=(len(pieces) - 0.4, -0.6), xlim=(0, None))
    left.set_yticks(at, [piece.end for _, piece in pieces], fontsize=8)
    right.set_yticks([])
    left.set(xlabel="kept for the backward, MB", ylabel="can be cut after")
    right.set(xlabel="share of a forward's FLOPs, %")
    if several:
        for stage, inside in enumerate(plan.pieces):
            share = sum(piece.flops for piece in inside) / total
            kept = sum(piece.kept for piece in inside)
            right.barh(
                [0], [0], color=colour(stage), label=f"stage {stage}: {kept / 1e6:,.0f} MB, {share:.0%} of FLOPs"
            )
        figure.legend(fontsize=8, loc="outside lower center", ncols=min(4, len(plan.pieces)))
    write(figure, "--save", path)
