"""The loss over every rank's embeddings, with the exact gradient and no collective in backward.

A row's gradient needs, of every other row, its embedding and the sum it divides by: d/dz_i = Σ_j (p_ij + p_ji) z_j,
where p_ji = exp(s_ji) / total_j and s_ji = s_ij. Gathering both in forward (D + 1 numbers per row) lets each rank
compute the gradient of its own rows alone. This takes for granted that all ranks weigh all rows alike, as a mean or a
sum does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from locallearn.distributed import gather
from locallearn.losses._precision import LN2
from locallearn.losses._tiles import negatives, negatives_backward


class AcrossRanks(torch.autograd.Function):
    """-log sigmoid(positive - negatives) of this rank's anchors, the negatives being every rank's.

    Shapes: `positive` (A, N) for the A views that are anchors and V `rows` (N, D), all in bits, -> the losses (A, N) in
    nats and, if `top1`, the largest negative logits (A, N). `met` holds the pairs of views (u, v) in which u's rows have v's as
    negatives, `counts` the N of every rank
    of the group.
    """

    @staticmethod
    def forward(
        ctx: Any,
        positive: Tensor,
        met: Sequence[tuple[int, int]],
        counts: Sequence[int],
        bounded: bool,
        tile: int,
        top1: bool,
        products: torch.dtype | None,
        group: dist.ProcessGroup | None,
        *rows: Tensor,
    ) -> tuple[Tensor, Tensor]:
        views, anchors = len(rows), positive.shape[0]
        blocks = [*rows, *of_other_ranks(rows, counts, group)]  # block b holds view b % V
        every = range(len(blocks))
        looks = [(u, v) for u in every for v in every if (u % views, v % views) in met]
        sums, tops = negatives(
            blocks, [], [(u, v) for u, v in looks if u < views], views, bounded, tile, top1, products
        )
        repelling, largest = (part[: positive.numel()].view_as(positive) for part in (sums, tops))

        totals = torch.logaddexp2(repelling, positive)  # (A, N)
        never = totals.new_full((views - anchors, totals.shape[1]), torch.inf)  # views without losses of their own
        totals = torch.cat([totals, never])  # (V, N)
        ctx.save_for_backward(
            positive, repelling, torch.cat([*totals, *of_other_ranks(list(totals), counts, group)]), *blocks
        )
        ctx.looks = [block for pair in looks for block in pair]
        ctx.settings = views, bounded, tile, products
        ctx.mark_non_differentiable(largest)
        return -F.logsigmoid((positive - repelling) * LN2), largest

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        positive, repelling, totals, *blocks = ctx.saved_tensors
        grad = grad * LN2  # (A, N), all equal, here and on every other rank
        weights = [grad.mean().expand(block.shape[0]) for block in blocks]
        weights[: grad.shape[0]] = grad
        views = ctx.settings[0]
        moved = negatives_backward(blocks, [], ctx.looks, *ctx.settings, totals, torch.cat(weights), views)
        return -grad * torch.sigmoid((repelling - positive) * LN2), *[None] * 7, *moved


def of_other_ranks(
    parts: Sequence[Tensor],
    counts: Sequence[int],
    group: dist.ProcessGroup | None,
    gather: Callable[[Tensor, Sequence[int], dist.ProcessGroup | None], list[Tensor]] = gather,
) -> list[Tensor]:
    """Return the same parts, N rows each, of every other rank of the group in turn."""
    ranks = gather(torch.cat(tuple(parts)), [len(parts) * count for count in counts], group)
    del ranks[dist.get_rank(group)]
    return [part for rank in ranks for part in rank.chunk(len(parts))]
