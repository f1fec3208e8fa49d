"""Log-sum-exps over negatives, one tile of the similarity matrix at a time: it is never whole.

The rows come in blocks (one per view, or a queue), scaled so that their dot products are logits in bits. `looks` lists
the pairs of blocks (u, v) in which the rows of u have those of v as negatives. Similarity is symmetric: one tile serves
(u, v) and (v, u), and of a block with itself only the upper triangle is visited.

                block 0   block 1
    block 0     o # # #   o # # #       #  computed once, summed along its rows and along its columns
                  o # #   # o # #       o  without its diagonal in the first `twins` blocks, the views of the same
                    o #   # # o #          images: there a row meets itself, or its positive
                      o   # # # o
    block 1               o # # #
                            o # #
                              o #
                                o
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from locallearn.losses._precision import full_precision, narrow, product, pull, pull_back
from locallearn.losses._second import refuse, save_nothing


class Tile(NamedTuple):
    """Some rows of block u against some columns, which are rows of block v."""

    u: int
    rows: slice
    v: int
    columns: slice
    forth: bool  # the rows look at the columns
    back: bool  # the columns look at the rows

    @property
    def level(self) -> bool:
        """Whether the tile's diagonal joins equal rows of both blocks."""
        return bool(self.rows.start == self.columns.start)

    @property
    def on_diagonal(self) -> bool:
        """Whether the tile is its own transpose."""
        return self.u == self.v and self.level

    def sides(self) -> list[tuple[int, int, slice]]:
        """List what to sum: (dimension, block, rows that receive the sum)."""
        forth = [(1, self.u, self.rows)] if self.forth else []
        back = [(0, self.v, self.columns)] if self.back and not self.on_diagonal else []
        return forth + back


def tiles(blocks: Sequence[Tensor], looks: Sequence[int], tile: int) -> Iterator[Tile]:
    """Visit every pair of rows that `looks` (u, v, u, v, ...) asks for, in one direction or both, once."""
    pairs = set(zip(looks[::2], looks[1::2], strict=True))
    for u, v in sorted({(min(pair), max(pair)) for pair in pairs}):
        for i in range(0, blocks[u].shape[0], tile):
            for j in range(i if u == v else 0, blocks[v].shape[0], tile):
                yield Tile(u, slice(i, i + tile), v, slice(j, j + tile), (u, v) in pairs, (v, u) in pairs)


def same_label(labels: Sequence[Tensor], at: Tile) -> Tensor:
    """Say which rows and columns have one label: (rows, columns)."""
    return labels[at.u][at.rows, None] == labels[at.v][at.columns]


def log2sumexp2(logits: Tensor, largest: Tensor, dim: int) -> Tensor:
    """Return log2 of the sum of 2^logit along `dim`, given the largest logit along it."""
    largest = largest.clamp(min=torch.finfo(logits.dtype).min)  # where all are -inf, so is the result
    return (logits - largest.unsqueeze(dim)).exp2_().sum(dim).log2_().add_(largest)


def _logits(blocks: Sequence[Tensor], labels: Sequence[Tensor], twins: int, at: Tile) -> Tensor:
    logits = product(blocks[at.u][at.rows], blocks[at.v][at.columns])
    if at.level and max(at.u, at.v) < twins:
        logits.diagonal().fill_(-torch.inf)
    return logits.masked_fill_(same_label(labels, at), -torch.inf) if labels else logits


def negatives(
    blocks: Sequence[Tensor],
    labels: Sequence[Tensor],
    looks: Sequence[tuple[int, int]],
    twins: int,
    bounded: bool,
    tile: int,
    top1: bool,
    products: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Return log2 of the sum of 2^logit over each row's negatives, and the largest logit: (R,), (R,), block by block.

    Where there are labels, one per row of every block, rows of one label are no negatives of each other. A row without
    negatives gets -inf. `bounded` promises that no logit exceeds 60 bits either way, so that 2^logit fits into single
    precision as it is. The largest logits carry no gradient; they are -inf where nobody asks for `top1`.
    `products` is the type in which rows are multiplied, if not their own.
    """
    flat = [block for pair in looks for block in pair]
    sums, largest = _negatives(blocks, labels, flat, twins, bounded, tile, top1, products)
    return sums, largest.detach()


@torch.library.custom_op(
    "locallearn::negatives",
    mutates_args=(),
    schema="(Tensor[] blocks, Tensor[] labels, SymInt[] looks, SymInt twins, bool bounded, SymInt tile, "
    "bool top1, ScalarType? products) -> (Tensor, Tensor)",
)
def _negatives(
    blocks: Sequence[Tensor],
    labels: Sequence[Tensor],
    looks: Sequence[int],
    twins: int,
    bounded: bool,
    tile: int,
    top1: bool,
    products: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    sums = [block.new_full(block.shape[:1], -torch.inf) for block in blocks]
    largest = [part.clone() for part in sums]
    blocks = [narrow(block, products) for block in blocks]
    with full_precision(blocks[0].device):
        for at in tiles(blocks, looks, tile):
            logits, sides = _logits(blocks, labels, twins, at), at.sides()
            tops = [logits.amax(dim) for dim, _, _ in sides] if top1 or not bounded else []
            if bounded:
                logits.exp2_()
                parts = [logits.sum(dim).log2_() for dim, _, _ in sides]
            else:
                parts = [log2sumexp2(logits, top, dim) for top, (dim, _, _) in zip(tops, sides, strict=True)]
            del logits  # before the next tile is there
            for part, (_, block, rows) in zip(parts, sides, strict=True):
                sums[block][rows] = torch.logaddexp2(sums[block][rows], part)
            for top, (_, block, rows) in zip(tops if top1 else [], sides, strict=top1):
                largest[block][rows] = torch.maximum(largest[block][rows], top)
    return torch.cat(sums), torch.cat(largest)


@torch.library.custom_op(
    "locallearn::negatives_backward",
    mutates_args=(),
    schema="(Tensor[] blocks, Tensor[] labels, SymInt[] looks, SymInt twins, bool bounded, SymInt tile, "
    "ScalarType? products, Tensor sums, Tensor grad, SymInt wanted) -> Tensor[]",
)
def negatives_backward(
    blocks: Sequence[Tensor],
    labels: Sequence[Tensor],
    looks: Sequence[int],
    twins: int,
    bounded: bool,
    tile: int,
    products: torch.dtype | None,
    sums: Tensor,
    grad: Tensor,
    wanted: int,
) -> list[Tensor]:
    """Return the gradient of `grad · sums` with respect to the first `wanted` blocks.

    Logits being symmetric, a pair's weight is grad_i 2^(s_ij - sums_i) + grad_j 2^(s_ij - sums_j), and a tile of
    weights moves its rows towards its columns and, transposed, its columns towards its rows.
    """
    sizes = [block.shape[0] for block in blocks]
    sums = sums.masked_fill(sums == -torch.inf, torch.inf)  # where there are no negatives, 2^(s - sums) is to be 0
    total, share, scale = (torch.split(part, sizes) for part in (sums, grad, grad * torch.exp2(-sums)))
    moved = [torch.zeros_like(block) for block in blocks[:wanted]]
    blocks = [narrow(block, products) for block in blocks]

    def weights(logits: Tensor, at: Tile) -> Tensor:
        if bounded:  # one power serves both directions
            if not (at.forth and at.back):
                return logits.exp2_().mul_(scale[at.u][at.rows, None] if at.forth else scale[at.v][at.columns])
            return logits.exp2_().mul_(scale[at.u][at.rows, None] + scale[at.v][at.columns])
        weight = torch.zeros_like(logits)
        if at.forth:
            weight += (logits - total[at.u][at.rows, None]).exp2_().mul_(share[at.u][at.rows, None])
        if at.back:
            weight += (logits - total[at.v][at.columns]).exp2_().mul_(share[at.v][at.columns])
        return weight

    with full_precision(blocks[0].device):
        for at in tiles(blocks, looks, tile):
            if at.u < wanted:  # v is not below u
                move(moved, blocks, at, weights(_logits(blocks, labels, twins, at), at))
    return moved


def move(moved: Sequence[Tensor], blocks: Sequence[Tensor], at: Tile, weight: Tensor) -> None:
    """Add what a tile of weights contributes to the gradients of those blocks that want one, the first ones."""
    moved[at.u][at.rows] += pull(weight, blocks[at.v][at.columns])
    if at.v < len(moved) and not at.on_diagonal:
        moved[at.v][at.columns] += pull_back(weight, blocks[at.u][at.rows])


@_negatives.register_fake
def _(
    blocks: Sequence[Tensor],
    labels: Sequence[Tensor],
    looks: Sequence[int],
    twins: int,
    bounded: bool,
    tile: int,
    top1: bool,
    products: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    sums = blocks[0].new_empty(sum(block.shape[0] for block in blocks))
    return sums, torch.empty_like(sums)


@negatives_backward.register_fake
def _(
    blocks: Sequence[Tensor],
    labels: Sequence[Tensor],
    looks: Sequence[int],
    twins: int,
    bounded: bool,
    tile: int,
    products: torch.dtype | None,
    sums: Tensor,
    grad: Tensor,
    wanted: int,
) -> list[Tensor]:
    return [torch.empty_like(block) for block in blocks[:wanted]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    blocks, labels, ctx.looks, ctx.twins, ctx.bounded, ctx.tile, _, ctx.products = inputs
    ctx.save_for_backward(*blocks, *labels, output[0])
    ctx.count = len(blocks)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[object, ...]:
    *saved, sums = ctx.saved_tensors
    blocks, labels = saved[: ctx.count], saved[ctx.count :]
    wanted = up_to_last(ctx.needs_input_grad[0])
    settings = ctx.looks, ctx.twins, ctx.bounded, ctx.tile, ctx.products
    moved = negatives_backward(blocks, labels, *settings, sums, grad, wanted)
    return [*moved, *[None] * (ctx.count - wanted)], [None] * len(labels), *[None] * 6


def up_to_last(needed: Sequence[bool]) -> int:
    """Count the blocks up to the last one whose gradient is needed."""
    return max((number for number, needs in enumerate(needed, start=1) if needs), default=0)


_negatives.register_autograd(_backward, setup_context=_save)
negatives_backward.register_autograd(refuse, setup_context=save_nothing)
