"""Numbers that tell how vectors lie: spread, effective rank, alignment, uniformity, similarity, a vote of neighbours."""

from __future__ import annotations

from math import log, nan

import torch
import torch.nn.functional as F
from torch import Tensor

_TILE = 2**24  # numbers in a tile of what is compared with everything


def single(features: Tensor) -> Tensor:
    """In single precision, or better where it is better, without a graph."""
    return features.detach().to(torch.promote_types(features.dtype, torch.float32))


def spread(embeddings: Tensor) -> Tensor:
    """The standard deviation over a batch of normalised embeddings ``(N, D)``, times ``sqrt(D)``.

    1 where they lie evenly on the sphere, 0 where they are all the same (Chen & He, *SimSiam*, 2021, section 4.1).
    """
    points = F.normalize(single(embeddings), dim=1)
    result: Tensor = points.std(dim=0, correction=0).mean() * points.shape[1] ** 0.5
    return result


def alignment(one: Tensor, other: Tensor) -> Tensor:
    """The squared distances ``(N,)`` of positive pairs, rows of ``(N, D)``, on the unit sphere: 0 for pairs that agree.

    Their mean is Wang & Isola's alignment loss (2020, *Understanding Contrastive Representation Learning*).
    """
    return (F.normalize(single(one), dim=1) - F.normalize(single(other), dim=1)).square().sum(dim=1)


def uniformity(features: Tensor) -> float:
    """``log mean exp(-2 |x - y|^2)`` over all pairs of rows of ``(N, D)`` on the unit sphere: 0 in a point, near -4 where even.

    Wang & Isola, 2020. In tiles, so that no matrix of all pairs is built; nan for fewer than two rows.
    """
    points = F.normalize(single(features), dim=1)
    count = len(points)
    if count < 2:
        return nan
    total = -float((4 * points.square().sum(dim=1) - 4).exp().sum(dtype=torch.float64))  # each row with itself
    for rows in torch.split(points, max(1, _TILE // count)):
        total += float((4 * (rows @ points.T) - 4).exp().sum(dtype=torch.float64))
    return log(total / (count * (count - 1))) if total > 0 else nan


def effective_rank(features: Tensor) -> float:
    """The exponential of the entropy of the normalised singular values of ``(N, D)``: RankMe (Garrido et al., 2023).

    From 1, where all rows are multiples of one, to ``min(N, D)``; nan if something is not finite.
    """
    wide = features.detach().to("cpu", torch.float64)
    return entropy_rank(torch.linalg.svdvals(wide)) if bool(wide.isfinite().all()) else nan


def entropy_rank(singular: Tensor) -> float:
    """``exp(-sum p log p)``, where ``p`` are the singular values over their sum; 0 where all are zero."""
    total = singular.sum()
    if not total > 0:
        return 0.0
    share = singular / total
    return float(torch.special.entr(share).sum().exp())


class Moments:
    """What is left of any number of vectors: their sum, and their products with each other, in double precision.

    Enough for effective rank and linear CKA, in memory that does not grow with their number. All is relative to
    the first batch's mean, so that the differences in :meth:`centred` do not cancel.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, one: Tensor, other: Tensor | None = None) -> None:
        """Rows ``(N, D)``, and rows ``(N, E)`` of the same images; the same ones by default."""
        self._rounding = torch.finfo(one.dtype if one.is_floating_point() else torch.float64).eps
        left, right = _double(one), _double(one if other is None else other)
        if not self.count:
            self._shifts = left.mean(dim=0), right.mean(dim=0)
            self._sums = torch.zeros_like(left[0]), torch.zeros_like(right[0])
            self._products = left.new_zeros(left.shape[1], right.shape[1])
        left, right = left - self._shifts[0], right - self._shifts[1]
        self.count += len(left)
        self._sums = self._sums[0] + left.sum(dim=0), self._sums[1] + right.sum(dim=0)
        self._products += left.T @ right

    def centred(self) -> Tensor:
        """``(X - mean)^T (Y - mean)``."""
        return self._products - torch.outer(*self._sums) / self.count

    def constant(self) -> bool:
        """Whether the first vectors of all images are the same, but for rounding."""
        size = self.count * self._shifts[0].square().sum()
        return not bool(self.centred().norm() > size * (2 * self._rounding) ** 2)

    def effective_rank(self) -> float:
        """As :func:`effective_rank` of all rows together."""
        (shift, _), (total, _) = self._shifts, self._sums
        gram = self._products + torch.outer(shift, total) + torch.outer(total, shift)
        gram += self.count * torch.outer(shift, shift)
        if not bool(gram.isfinite().all()):
            return nan
        values = torch.linalg.eigvalsh(gram)
        noise = values[-1] * len(values) * torch.finfo(values.dtype).eps  # what rounding leaves of a zero
        return entropy_rank(torch.where(values > noise, values, 0).sqrt())


def _double(features: Tensor) -> Tensor:
    device = "cpu" if features.device.type == "mps" else features.device  # which has no double precision
    return features.detach().to(device, torch.float64)


def nearest(queries: Tensor, known: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The cosines of the ``k`` rows of ``known`` nearest in angle to each query, and which they are: ``(B, k)`` both.

    Tile by tile, so that ``known`` may be as large as a disk.
    """
    queries = F.normalize(queries, dim=1)
    cosines, found = queries.new_zeros(len(queries), 0), torch.zeros(len(queries), 0, dtype=torch.long)
    found = found.to(queries.device)
    size = max(1, _TILE // (queries.shape[1] + len(queries)))
    for start in range(0, len(known), size):
        rows = F.normalize(known[start : start + size].to(queries), dim=1)
        near, at = (queries @ rows.T).topk(min(k, len(rows)), dim=1)
        cosines, found = torch.cat([cosines, near], dim=1), torch.cat([found, at + start], dim=1)
        cosines, order = cosines.topk(min(k, cosines.shape[1]), dim=1)
        found = found.gather(1, order)
    return cosines, found


def vote(queries: Tensor, known: Tensor, labels: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """The class ``(B,)`` for which the ``k`` nearest of ``known`` vote, each with weight ``exp(cosine / temperature)``.

    Wu et al., *Instance Discrimination*, 2018, section 3.4.

    Args:
        queries: ``(B, D)``.
        known: ``(N, D)``.
        labels: ``(N,)``, their classes, from 0.
        k: how many vote.
        temperature: how much the nearest ones count more.
    """
    cosines, found = nearest(queries, known, k)
    votes = cosines.new_zeros(len(queries), int(labels.max()) + 1)
    votes.scatter_add_(1, labels.to(found.device)[found], ((cosines - 1) / temperature).exp())
    return votes.argmax(dim=1)
