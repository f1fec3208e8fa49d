"""Cuts for a pipeline: each rank gets as many stages, and as much to compute as the others, as far as blocks allow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import combinations, pairwise
from math import inf

from locallearn.memory.pieces import Piece
from locallearn.plan import Plan


def stage_flops(plan: Plan, stage: int, pieces: Sequence[Piece]) -> float:
    """What a stage costs in a step of its rank.

    Its forward; the gradients of its weights, for which the gradient passes through it once, twice as much; that way once more
    for each unit that walks on below it, unless it is the only one here and takes the weights along; and forward and backward
    of the decoders at its outlet.

    Example:
        >>> from torch import Size
        >>> block = Piece("0", Size([8]), 10, 0, 0, 0, 0, 0, 0, 0, 1, 0)
        >>> [stage_flops(Plan.windows(3, overlap=1), stage, [block]) for stage in range(3)]
        [30.0, 43.0, 33.0]
    """
    forward = sum(piece.flops for piece in pieces)
    reaching = [unit for unit in plan.units if unit.lowest <= stage <= unit.last]
    walks = sum(unit.lowest < stage for unit in reaching) if len(reaching) > 1 else 0
    decoders = sum(unit.last == stage for unit in reaching)
    return float(forward * (1 + 2 * bool(reaching) + walks) + 3 * decoders * pieces[-1].decoder_flops)


def balanced(pieces: Sequence[Piece], plan: Plan, ranks: int) -> tuple[int, ...]:
    """How many pieces lie up to the end of each stage, so that the rank with the most to do has the least possible: exact."""
    each = plan.stages // ranks

    @cache
    def rank_alone(rank: int, begin: int, end: int) -> tuple[float, tuple[int, ...]]:
        """The cheapest way to make the rank's stages of these pieces."""
        best: tuple[float, tuple[int, ...]] = (inf, ())
        for inner in combinations(range(begin + 1, end), each - 1):
            ends = (*inner, end)
            parts = [pieces[a:b] for a, b in pairwise((begin, *ends))]
            if any(part[-1].train == inf and _decodes(plan, rank * each + k) for k, part in enumerate(parts)):
                continue
            cost = sum(stage_flops(plan, rank * each + k, part) for k, part in enumerate(parts))
            best = min(best, (cost, ends))
        return best

    @cache
    def up_to(rank: int, end: int) -> tuple[float, float, tuple[int, ...]]:
        """The lowest maximum over ranks 0 to ``rank`` of pieces before ``end``; of equal ones, that with the least in all."""
        if rank < 0:
            return (0.0, 0.0, ()) if end == 0 else (inf, inf, ())
        best: tuple[float, float, tuple[int, ...]] = (inf, inf, ())
        for begin in range(rank * each, end - each + 1):
            below = up_to(rank - 1, begin)
            cost, ends = rank_alone(rank, begin, end)
            if below[0] < inf and cost < inf:
                best = min(best, (max(below[0], cost), below[1] + cost, (*below[2], *ends)))
        return best

    most, _, ends = up_to(ranks - 1, len(pieces))
    if most == inf:
        raise ValueError(
            f"{plan.stages} stages on {ranks} ranks need as many pieces with a decoder that fits; the model can be cut after "
            f"{[piece.end for piece in pieces]}"
        )
    return ends


def _decodes(plan: Plan, stage: int) -> bool:
    return any(unit.last == stage for unit in plan.units)
