"""What progressive ResNets are made of: residual blocks that shrink maps by bilinear interpolation."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Stage:
    """A stage of residual blocks.

    Attributes:
        base: channels of its 3x3 convolutions.
        size: its maps' side as (numerator, denominator) of the side before.
        expansion: 1 for basic blocks; otherwise bottlenecks that put out ``expansion * base`` channels.
        groups: of the convolutions on the residual branch.
        dense: in so many blocks, from the first on, the last 1x1 convolution is not grouped.
        blocks: how many.
    """

    base: int
    size: tuple[int, int] = (1, 1)
    expansion: int = 1
    groups: int = 1
    dense: int = 1
    blocks: int = 3

    @property
    def channels(self) -> int:
        """The width of the outlet."""
        return self.base * self.expansion


class Resize(nn.Module):
    """Bilinear interpolation of maps `(N, C, H, W)` to a part of their size, rounded; at least one pixel."""

    def __init__(self, numerator: int, denominator: int) -> None:
        super().__init__()
        self.numerator, self.denominator = numerator, denominator

    def forward(self, maps: Tensor) -> Tensor:
        if self.numerator == self.denominator:
            return maps
        part = [
            max(1, (2 * side * self.numerator + self.denominator) // (2 * self.denominator)) for side in maps.shape[2:]
        ]
        return F.interpolate(maps, size=part, mode="bilinear", align_corners=False)

    def extra_repr(self) -> str:
        return f"{self.numerator}/{self.denominator}"


class Basic(nn.Module):
    """Two 3x3 convolutions beside a shortcut; resized in front of both."""

    def __init__(self, before: int, stage: Stage) -> None:
        super().__init__()
        self.resize = Resize(*stage.size)
        self.conv1 = nn.Conv2d(before, stage.base, 3, padding=1, groups=stage.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(stage.base)
        self.conv2 = nn.Conv2d(stage.base, stage.base, 3, padding=1, groups=stage.groups, bias=False)
        self.bn2 = nn.BatchNorm2d(stage.base)
        self.downsample = _shortcut(before, stage.channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.resize(maps)
        out = self.relu(self.bn1(self.conv1(maps)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(maps)
        result: Tensor = self.relu(out)
        return result


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a shortcut, resized between the first two.

    Where in between the paper leaves open; before the normalisation no backward needs the larger maps.
    """

    def __init__(self, before: int, stage: Stage, dense: bool) -> None:
        super().__init__()
        self.resize = Resize(*stage.size)
        self.conv1 = nn.Conv2d(before, stage.base, 1, groups=stage.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(stage.base)
        self.conv2 = nn.Conv2d(stage.base, stage.base, 3, padding=1, groups=stage.groups, bias=False)
        self.bn2 = nn.BatchNorm2d(stage.base)
        self.conv3 = nn.Conv2d(stage.base, stage.channels, 1, groups=1 if dense else stage.groups, bias=False)
        self.bn3 = nn.BatchNorm2d(stage.channels)
        self.downsample = _shortcut(before, stage.channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, maps: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.resize(self.conv1(maps))))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.downsample(self.resize(maps))
        result: Tensor = self.relu(out)
        return result


def _shortcut(before: int, after: int) -> nn.Module:
    if before == after:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after))
