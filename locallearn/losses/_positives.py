"""Log-sum-exps over the rows of one's own label, in tiles, and how far they lie above the mean.

SupCon's loss of a row, log Σ_all exp(s) - mean_positives(s), is softplus(negatives - positives) + spread, where
`positives` is the log-sum-exp over the positives and spread = positives - mean. For a single positive the spread is
exactly zero: as for a pair without labels, no near-equal numbers are subtracted.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from locallearn.losses._precision import full_precision, narrow, product
from locallearn.losses._second import refuse, save_nothing
from locallearn.losses._tiles import Tile, log2sumexp2, move, same_label, tiles, up_to_last


def positives(
    blocks: Sequence[Tensor],
    labels: Sequence[Tensor],
    looks: Sequence[tuple[int, int]],
    tile: int,
    products: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log2 of the sum of 2^logit over a row's positives, that minus their mean, and the largest: (R,) each.

    A row without positives gets -inf, zero and -inf. The largest logits carry no gradient.
    `products` is the type in which rows are multiplied, if not their own.
    """
    flat = [block for pair in looks for block in pair]
    sums, spreads, largest, _ = _positives(blocks, labels, flat, tile, products)
    return sums, spreads, largest.detach()


def _hits(blocks: Sequence[Tensor], labels: Sequence[Tensor], at: Tile) -> tuple[Tensor, Tensor]:
    hit = same_label(labels, at)
    if at.on_diagonal:
        hit.fill_diagonal_(False)
    return hit, product(blocks[at.u][at.rows], blocks[at.v][at.columns])


@torch.library.custom_op(
    "locallearn::positives",
    mutates_args=(),
    schema="(Tensor[] blocks, Tensor[] labels, SymInt[] looks, SymInt tile, ScalarType? products) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _positives(
    blocks: Sequence[Tensor],
    labels: Sequence[Tensor],
    looks: Sequence[int],
    tile: int,
    products: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = [block.new_full(block.shape[:1], -torch.inf) for block in blocks]
    largest = [part.clone() for part in sums]
    totals = [torch.zeros_like(part) for part in sums]
    counts = [torch.zeros_like(part) for part in sums]
    blocks = [narrow(block, products) for block in blocks]
    with full_precision(blocks[0].device):
        for at in tiles(blocks, looks, tile):
            hit, logits = _hits(blocks, labels, at)
            chosen, weighed = logits.masked_fill(~hit, -torch.inf), logits.masked_fill_(~hit, 0)
            for dim, block, rows in at.sides():
                top = chosen.amax(dim)
                sums[block][rows] = torch.logaddexp2(sums[block][rows], log2sumexp2(chosen, top, dim))
                largest[block][rows] = torch.maximum(largest[block][rows], top)
                totals[block][rows] += weighed.sum(dim)
                counts[block][rows] += hit.sum(dim)
    total, count = torch.cat(sums), torch.cat(counts)
    spread = (total - torch.cat(totals) / count).masked_fill_(count <= 1, 0)
    return total, spread, torch.cat(largest), count


@torch.library.custom_op(
    "locallearn::positives_backward",
    mutates_args=(),
    schema="(Tensor[] blocks, Tensor[] labels, SymInt[] looks, SymInt tile, ScalarType? products, Tensor sums, "
    "Tensor counts, Tensor grad_sums, Tensor grad_spreads, SymInt wanted) -> Tensor[]",
)
def _positives_backward(
    blocks: Sequence[Tensor],
    labels: Sequence[Tensor],
    looks: Sequence[int],
    tile: int,
    products: torch.dtype | None,
    sums: Tensor,
    counts: Tensor,
    grad_sums: Tensor,
    grad_spreads: Tensor,
    wanted: int,
) -> list[Tensor]:
    sizes = [block.shape[0] for block in blocks]
    sums = sums.masked_fill(counts == 0, torch.inf)
    grad_spreads = grad_spreads.masked_fill(counts <= 1, 0)
    parts = [torch.split(part, sizes) for part in (sums, counts.clamp(min=1).reciprocal(), grad_sums, grad_spreads)]
    moved = [torch.zeros_like(block) for block in blocks[:wanted]]
    blocks = [narrow(block, products) for block in blocks]

    def weights(logits: Tensor, block: int, rows: slice, dim: int) -> Tensor:
        total, mean, grad_sum, grad_spread = (part[block][rows].unsqueeze(dim) for part in parts)
        share = (logits - total).exp2_()
        return share * grad_sum + (share - mean) * grad_spread  # summing the gradients first would round

    with full_precision(blocks[0].device):
        for at in tiles(blocks, looks, tile):
            if at.u < wanted:
                hit, logits = _hits(blocks, labels, at)
                weight = torch.zeros_like(logits)
                if at.forth:
                    weight += weights(logits, at.u, at.rows, 1)
                if at.back:
                    weight += weights(logits, at.v, at.columns, 0)
                move(moved, blocks, at, weight.masked_fill_(~hit, 0))
    return moved


@_positives.register_fake
def _(
    blocks: Sequence[Tensor],
    labels: Sequence[Tensor],
    looks: Sequence[int],
    tile: int,
    products: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = blocks[0].new_empty(sum(block.shape[0] for block in blocks))
    return sums, torch.empty_like(sums), torch.empty_like(sums), torch.empty_like(sums)


@_positives_backward.register_fake
def _(
    blocks: Sequence[Tensor],
    labels: Sequence[Tensor],
    looks: Sequence[int],
    tile: int,
    products: torch.dtype | None,
    sums: Tensor,
    counts: Tensor,
    grad_sums: Tensor,
    grad_spreads: Tensor,
    wanted: int,
) -> list[Tensor]:
    return [torch.empty_like(block) for block in blocks[:wanted]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    blocks, labels, ctx.looks, ctx.tile, ctx.products = inputs
    sums, _, _, counts = output
    ctx.save_for_backward(*blocks, *labels, sums, counts)
    ctx.count = len(blocks)


def _backward(ctx: Any, grad_sums: Tensor, grad_spreads: Tensor, *_: Tensor) -> tuple[object, ...]:
    *saved, sums, counts = ctx.saved_tensors
    blocks, labels = saved[: ctx.count], saved[ctx.count :]
    wanted = up_to_last(ctx.needs_input_grad[0])
    settings = ctx.looks, ctx.tile, ctx.products
    moved = _positives_backward(blocks, labels, *settings, sums, counts, grad_sums, grad_spreads, wanted)
    return [*moved, *[None] * (ctx.count - wanted)], [None] * len(labels), None, None, None


_positives.register_autograd(_backward, setup_context=_save)
_positives_backward.register_autograd(refuse, setup_context=save_nothing)
