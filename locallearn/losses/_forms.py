"""Which rows meet in each form of the loss, and which computation carries it out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from locallearn.distributed import gather_with_gradient
from locallearn.losses._kept import Kept
from locallearn.losses._matrix import matrix_losses
from locallearn.losses._positives import positives
from locallearn.losses._precision import LN2
from locallearn.losses._ranks import AcrossRanks, of_other_ranks
from locallearn.losses._rows import unit
from locallearn.losses._tiles import negatives


class Settings(NamedTuple):
    """How rows are compared, whatever rows they are.

    Attributes:
        form: "nt-xent", "two-way" or "one-way".
        temperature: a number, or a tensor of one element.
        bounded: all logits are known to lie within 60 bits.
        attract: rows of one label are positives, if there are labels; else neither positives nor negatives.
        alike: all ranks weigh all losses alike.
        tile: rows and columns of a tile; None chooses, 0 builds the whole matrix by torch's own operators.
        top1: whether to tell what is nearest.
        products: the type in which rows are multiplied, if not their own.
        group: whose ranks' rows are negatives.
    """

    form: str
    temperature: float | Tensor
    bounded: bool
    attract: bool
    alike: bool
    tile: int | None
    top1: bool
    products: torch.dtype | None
    group: dist.ProcessGroup | None


def in_batch(
    views: Sequence[Tensor], counts: Sequence[int], labels: Tensor | None, how: Settings
) -> tuple[Tensor, Tensor]:
    """Compare views with each other: V times (N, D) -> losses (A, N) in nats, and whether a positive is nearest (A, N).

    The A anchors are the views that have losses of their own. `counts` holds the N of every rank of the group. What is
    nearest is told only for `top1`.
    """
    number, everywhere = len(views), len(counts) > 1
    if labels is None and not everywhere and _may_be_kept(views, how):
        both = unit(torch.cat(tuple(views)), how.temperature)
        kept: tuple[Tensor, Tensor] = Kept.apply(both, how.form, how.top1, how.products)
        return kept

    rows = [unit(view, how.temperature, plainly=how.tile == 0) for view in views]
    met = _met(how.form, number)
    anchors = 1 + max(u for u, _ in met)
    tile = _default_tile(rows[0]) if how.tile is None else how.tile
    if everywhere and how.alike and labels is None and tile:
        attracting, spread, nearest = _twins(rows, anchors)
        settings = how.bounded, tile, how.top1, how.products, how.group
        losses, largest = AcrossRanks.apply(attracting, met, counts, *settings, *rows)
        return losses + spread * LN2, nearest > largest

    blocks, marks = list(rows), [] if labels is None else [labels] * number  # block b holds view b % V
    if everywhere:
        blocks += of_other_ranks(rows, counts, how.group, gather_with_gradient)
        marks += [] if labels is None else [mark for mark in of_other_ranks([labels], counts, how.group) for _ in rows]
    looks = [(u, v) for u in range(number) for v in range(len(blocks)) if (u, v % number) in met]
    attract = how.attract and labels is not None
    if not tile:
        return matrix_losses(blocks, marks, looks, number, attract)

    shape = anchors, rows[0].shape[0]
    own = slice(math.prod(shape))
    sums = negatives(blocks, marks, looks, number, how.bounded, tile, how.top1, how.products)
    repelling, largest = (part[own].view(shape) for part in sums)
    if attract:
        sums_of_label = positives(blocks, marks, looks, tile, how.products)
        attracting, spread, nearest = (part[own].view(shape) for part in sums_of_label)
        alone = attracting == -math.inf  # the only row of its label has no positive, and no loss
        attracting = attracting.masked_fill(alone, math.inf)
    else:
        attracting, spread, nearest = _twins(rows, anchors)
    return -F.logsigmoid((attracting - repelling) * LN2) + spread * LN2, nearest > largest


def against_given(views: Sequence[Tensor], others: Tensor, how: Settings) -> tuple[Tensor, Tensor]:
    """Compare queries and keys, twice (N, D), with negatives (M, D) or (N, M, D) -> losses (N,), and top-1 (N,)."""
    plainly = how.tile == 0 or others.dim() == 3  # nothing in tiles
    query, key, others = (unit(x, how.temperature, plainly) for x in (*views, others))
    positive = (query * key).sum(1)
    tile = _default_tile(query) if how.tile is None else how.tile
    if others.dim() == 2 and tile:
        both = negatives([query, others], [], [(0, 1)], 0, how.bounded, tile, how.top1, how.products)
        repelling, largest = (part[: query.shape[0]] for part in both)
    else:
        dots = query @ others.t() if others.dim() == 2 else (others @ query[:, :, None])[:, :, 0]
        repelling, largest = (dots * LN2).logsumexp(1) / LN2, dots.detach().amax(1)
    return -F.logsigmoid((positive - repelling) * LN2), positive.detach() > largest


def _may_be_kept(views: Sequence[Tensor], how: Settings) -> bool:
    """Whether the whole matrix is small, and the rest as `Kept` wants it."""
    rows = views[0].shape[0] * (2 if how.form == "nt-xent" else 1)
    most = 2048 if views[0].device.type == "cpu" else 4096
    return len(views) == 2 and how.tile is None and how.bounded and rows <= most


def _met(form: str, views: int) -> list[tuple[int, int]]:
    """List the pairs of views (u, v) in which the rows of u meet those of v."""
    if form == "nt-xent":
        return [(u, v) for u in range(views) for v in range(views)]
    return [(0, 1), (1, 0)] if form == "two-way" else [(0, 1)]


def _twins(rows: Sequence[Tensor], anchors: int) -> tuple[Tensor, Tensor | float, Tensor]:
    """Return each anchor's log-sum-exp over its image's other views, that minus the mean, and the largest logit."""
    if len(rows) == 2:
        logit = (rows[0] * rows[1]).sum(1).expand(anchors, -1)
        return logit, 0.0, logit.detach()  # a difference of equal numbers would round
    every = range(len(rows))
    pairs = {(u, v): (rows[u] * rows[v]).sum(1) for u in every for v in every if u < v}
    logits = torch.stack([torch.stack([pairs[min(u, v), max(u, v)] for v in every if v != u]) for u in range(anchors)])
    total = (logits * LN2).logsumexp(1) / LN2
    return total, total - logits.mean(1), logits.detach().amax(1)


def _default_tile(rows: Tensor) -> int:
    """Choose a tile that stays in the cache of a CPU and is worth sharing among its cores, or that fills a GPU."""
    return 768 if rows.device.type == "cpu" else 4096
