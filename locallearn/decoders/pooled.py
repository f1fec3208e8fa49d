"""A decoder of averages, and the MLP with which every decoder ends."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn


def mlp(width: int, hidden: int | None, out_features: int, depth: int) -> nn.Sequential:
    """``depth`` linear layers with ReLU in between."""
    if depth < 1:
        raise ValueError(f"an MLP has at least one layer; got depth={depth}")
    sizes = [width, *[hidden or width] * (depth - 1), out_features]
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class MLPDecoder(nn.Module):
    """Global average pooling, then an MLP: SimCLR's projection head.

    With ``grid=2`` maps are averaged by quarters instead of as a whole, so that the MLP sees where something is. Local losses
    miss that more than a loss at the top does: without it CLAPP++ falls from 80.5 to 73.2 on CIFAR-10 (2026).

    Shapes: ``(N, channels, ...) -> (N, out_features)``, with any number of spatial axes; with a grid, ``(N, channels, H, W)``.

    Args:
        channels: width of the outlet.
        hidden: width of the MLP's hidden layers; that of the outlet by default.
        out_features: dimensions of the vectors (128 in the paper).
        depth: linear layers of the MLP: 2, or 4 for Table 4's "2-layer MLP" on top.
        grid: cells a side that a map is averaged to; the MLP reads ``grid * grid * channels`` numbers.

    Example:
        >>> import torch
        >>> MLPDecoder(64)(torch.zeros(8, 64, 56, 56)).shape
        torch.Size([8, 128])
        >>> MLPDecoder(64, grid=2).mlp[0]
        Linear(in_features=256, out_features=64, bias=True)
    """

    def __init__(
        self, channels: int, *, hidden: int | None = None, out_features: int = 128, depth: int = 2, grid: int = 1
    ) -> None:
        super().__init__()
        if grid < 1:
            raise ValueError(f"a grid has at least one cell a side; got grid={grid}")
        self.channels = channels
        self.grid = grid
        self.mlp = mlp(channels * grid**2, hidden or channels, out_features, depth)

    def forward(self, features: Tensor) -> Tensor:
        if self.grid == 1:
            fits = features.ndim >= 2 and features.shape[1] == self.channels
            check(self, features, f"(N, {self.channels}, ...)", fits)
            vectors = reduce(features, "n c ... -> n c", "mean")
        else:
            fits = features.ndim == 4 and features.shape[1] == self.channels
            check(self, features, f"(N, {self.channels}, H, W) with grid={self.grid}", fits)
            vectors = F.adaptive_avg_pool2d(features, self.grid).flatten(1)  # (N, C * grid * grid)
        result: Tensor = self.mlp(vectors)
        return result


def check(decoder: nn.Module, features: Tensor, expected: str, fits: bool) -> None:
    """Refuses what a decoder cannot read.

    Raises:
        ValueError: with what it reads, and which decoder reads what.
    """
    if not fits:
        raise ValueError(
            f"{type(decoder).__name__} reads {expected}; got {tuple(features.shape)}. MLPDecoder is for vectors and feature "
            "maps, ConvMLPDecoder for feature maps, TokenDecoder for token sequences; LocalWrapper's channel_axis= says which "
            "axis of an outlet holds the channels"
        )
