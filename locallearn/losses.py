"""InfoNCE, usable with nothing else from this library."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def info_nce(z0: Tensor, z1: Tensor, *, temperature: float = 0.1) -> Tensor:
    """NT-Xent: each embedding's positive is the other view of its image, all others are negatives (equation (1))."""
    if z0.ndim != 2 or z0.shape != z1.shape:
        raise ValueError(f"info_nce compares two views of shape (N, D); got {tuple(z0.shape)} and {tuple(z1.shape)}")
    if len(z0) < 2:
        raise ValueError(
            "InfoNCE needs at least two pairs, since the negatives come from the batch; got a batch of one"
        )
    with torch.autocast(z0.device.type, enabled=False):
        z = torch.cat([z0, z1])
        z = F.normalize(z if z.dtype == torch.float64 else z.float(), eps=1e-12)
        similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)  # (2N, 2N)
        positives = torch.arange(len(z), device=z.device).roll(len(z0))
        return F.cross_entropy(similarity, positives)


class InfoNCE(nn.Module):
    """:func:`info_nce` as a module."""

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        return info_nce(z0, z1, temperature=self.temperature)
