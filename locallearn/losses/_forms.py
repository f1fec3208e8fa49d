"""Which rows meet in each form of the loss, and which computation carries it out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from locallearn.distributed import gather_with_gradient
from locallearn.losses._matrix import matrix_losses
from locallearn.losses._positives import positives
from locallearn.losses._precision import LN2
from locallearn.losses._ranks import AcrossRanks, of_other_ranks
from locallearn.losses._tiles import negatives


def scale(x: Tensor, temperature: float | Tensor) -> Tensor:
    """Return what makes the dot products of rows cosine / temperature in bits: (..., D) -> (..., 1).

    It is zero for a row of zeros, and so is that row's gradient.
    """
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(()).to(x.dtype)
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (norm * (temperature * LN2) ** 0.5).masked_fill(norm == 0, math.inf).reciprocal()


def in_batch(
    rows: Sequence[Tensor],
    form: str,
    counts: Sequence[int],
    labels: Tensor | None,
    attract: bool,
    alike: bool,
    bounded: bool,
    tile: int | None,
    top1: bool,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Compare views with each other: V times (N, D) -> losses (A, N) in nats, and whether a positive is nearest (A, N).

    The A anchors are the views that have losses of their own. `counts` holds the N of every rank of the group; `alike`
    promises that all ranks weigh all losses alike. What is nearest is told only if `top1`.
    """
    views, everywhere = len(rows), len(counts) > 1
    met = _met(form, views)
    anchors = 1 + max(u for u, _ in met)
    tile = _default_tile(rows[0]) if tile is None else tile
    if everywhere and alike and labels is None and tile:
        attracting, spread, nearest = _twins(rows, anchors)
        losses, largest = AcrossRanks.apply(attracting, met, counts, bounded, tile, top1, group, *rows)
        return losses + spread * LN2, nearest > largest

    blocks, marks = list(rows), [] if labels is None else [labels] * views  # block b holds view b % V
    if everywhere:
        blocks += of_other_ranks(rows, counts, group, gather_with_gradient)
        marks += [] if labels is None else [mark for mark in of_other_ranks([labels], counts, group) for _ in rows]
    looks = [(u, v) for u in range(views) for v in range(len(blocks)) if (u, v % views) in met]
    attract = attract and labels is not None
    if not tile:
        return matrix_losses(blocks, marks, looks, views, attract)

    shape = anchors, rows[0].shape[0]
    own = slice(math.prod(shape))
    both = negatives(blocks, marks, looks, views, bounded, tile, top1)
    repelling, largest = (part[own].view(shape) for part in both)
    if attract:
        attracting, spread, nearest = (part[own].view(shape) for part in positives(blocks, marks, looks, tile))
        alone = attracting == -math.inf  # the only row of its label has no positive, and no loss
        attracting = attracting.masked_fill(alone, math.inf)
    else:
        attracting, spread, nearest = _twins(rows, anchors)
    return -F.logsigmoid((attracting - repelling) * LN2) + spread * LN2, nearest > largest


def against_given(
    rows: Sequence[Tensor],
    others: Tensor,
    temperature: float | Tensor,
    bounded: bool,
    tile: int | None,
    top1: bool,
) -> tuple[Tensor, Tensor]:
    """Compare queries and keys, twice (N, D), with negatives (M, D) or (N, M, D) -> losses (N,), and top-1 (N,)."""
    query, key = rows
    positive = (query * key).sum(1)
    scales = scale(others, temperature)
    tile = _default_tile(query) if tile is None else tile
    if others.dim() == 2 and tile:
        both = negatives([query, others * scales], [], [(0, 1)], 0, bounded, tile, top1)
        repelling, largest = (part[: query.shape[0]] for part in both)
    else:
        dots = query @ (others * scales).t() if others.dim() == 2 else (others @ query[:, :, None] * scales)[:, :, 0]
        repelling, largest = (dots * LN2).logsumexp(1) / LN2, dots.detach().amax(1)
    return -F.logsigmoid((positive - repelling) * LN2), positive.detach() > largest


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
    """Choose a tile that stays in the cache of a CPU core, or that fills a GPU."""
    return 512 if rows.device.type == "cpu" else 4096
