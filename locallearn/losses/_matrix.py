"""The loss by the whole matrix of logits, as one would write it down: what the tiles are compared with."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from locallearn.losses._precision import LN2


def matrix_losses(
    blocks: Sequence[Tensor], labels: Sequence[Tensor], looks: Sequence[tuple[int, int]], twins: int, attract: bool
) -> tuple[Tensor, Tensor]:
    """Each anchor's loss, and whether its nearest neighbour is a positive: (A, N) and (A, N).

    The first `twins` blocks are views of the same images. Rows of one label, where there are labels, are positives if
    they `attract`, and else neither positives nor negatives.
    """
    losses, right = [], []
    for u in sorted({u for u, _ in looks}):
        met = [v for w, v in looks if w == u]
        logits = torch.cat([blocks[u] @ blocks[v].t() for v in met], dim=1) * LN2  # (N, K)
        images = torch.cat([_same_row(blocks[u], blocks[v], u < twins and v < twins) for v in met], dim=1)
        itself = torch.cat([_same_row(blocks[u], blocks[v], u == v) for v in met], dim=1)
        kin = torch.cat([labels[u][:, None] == labels[v] for v in met], dim=1) if labels else images
        loss, nearest_is_positive = _losses(logits, (kin if attract else images) & ~itself, ~(kin | images))
        losses.append(loss)
        right.append(nearest_is_positive)
    return torch.stack(losses), torch.stack(right)


def _same_row(a: Tensor, b: Tensor, twins: bool) -> Tensor:
    same = torch.zeros(a.shape[0], b.shape[0], dtype=torch.bool, device=a.device)
    return same.fill_diagonal_(True) if twins else same


def _losses(logits: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    attracting = logits.masked_fill(~positive, -torch.inf)
    repelling = logits.masked_fill(~negative, -torch.inf)
    count = positive.sum(1)
    total = attracting.logsumexp(1)
    mean = logits.masked_fill(~positive, 0).sum(1) / count.clamp(min=1)
    spread = (total - mean).masked_fill(count <= 1, 0)  # exactly zero for one positive; a difference would round
    excess = -F.logsigmoid(total.masked_fill(count == 0, torch.inf) - repelling.logsumexp(1))
    return excess + spread, attracting.detach().amax(1) > repelling.detach().amax(1)
