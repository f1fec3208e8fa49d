"""InfoNCE straight from its definition, one row and one candidate at a time; slow, and hard to get wrong."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def oracle(
    views: Sequence[Tensor],
    temperature: float | Tensor = 0.1,
    form: str = "nt-xent",
    labels: Tensor | None = None,
    same_label: str = "attract",
) -> Tensor:
    """Losses of every anchor: V times (N, D) -> (A, N)."""
    unit = [view / view.norm(dim=1, keepdim=True) for view in views]
    n = views[0].shape[0]
    seen = {
        "nt-xent": {u: list(range(len(views))) for u in range(len(views))},
        "two-way": {0: [1], 1: [0]},
        "one-way": {0: [1]},
    }[form]
    losses = []
    for u, others in seen.items():
        for i in range(n):
            positives, negatives = [], []
            for v, j in [(v, j) for v in others for j in range(n)]:
                if (u, i) == (v, j):
                    continue
                logit = unit[u][i] @ unit[v][j] / temperature
                alike = labels is not None and bool(labels[i] == labels[j])
                if i == j or (alike and same_label == "attract"):
                    positives.append(logit)
                elif not alike:
                    negatives.append(logit)
            if not positives:
                losses.append(torch.zeros(()).to(views[0]))
                continue
            denominator = torch.stack(positives + negatives).logsumexp(0)
            losses.append(torch.stack([denominator - logit for logit in positives]).mean())
    return torch.stack(losses).view(len(seen), n)


def nearest_is_positive(
    views: Sequence[Tensor], form: str = "nt-xent", labels: Tensor | None = None, same_label: str = "attract"
) -> Tensor:
    """Whether each anchor's most similar candidate is one of its positives: V times (N, D) -> (A, N)."""
    unit = [view / view.norm(dim=1, keepdim=True) for view in views]
    n, right = views[0].shape[0], []
    seen = {"nt-xent": dict.fromkeys(range(len(views)), range(len(views))), "two-way": {0: [1], 1: [0]}}
    anchors = seen.get(form, {0: [1]})
    for u, others in anchors.items():
        for i in range(n):
            best, best_is_positive = -math.inf, False
            for v, j in [(v, j) for v in others for j in range(n) if (u, i) != (v, j)]:
                alike = labels is not None and bool(labels[i] == labels[j])
                positive = i == j or (alike and same_label == "attract")
                similarity = (unit[u][i] @ unit[v][j]).item()
                if (positive or not alike) and similarity > best:
                    best, best_is_positive = similarity, positive
            right.append(best_is_positive)
    return torch.tensor(right).view(len(anchors), n)


def pairs(n: int, d: int, seed: int = 0, noise: float = 1.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Two views that agree up to `noise`, ready for a gradient."""
    generator = torch.Generator().manual_seed(seed)
    z0 = torch.randn(n, d, generator=generator, dtype=torch.float64)
    z1 = z0 + noise * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return [z.to(dtype).requires_grad_() for z in (z0, z1)]
