"""ShuffleNet v2-50: the large ShuffleNet v2 of the paper's Tables 1 and 2 (Ma et al. 2018, Table 8)."""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

STAGES = ((244, 3), (488, 4), (976, 6), (1952, 3))  # channels of a unit's output, units


class ShuffleNetV2Large(nn.Module):
    """Four stages of shuffle units, with submodules named as torchvision's: ``conv1``, ``maxpool``, ``stage2`` ... ``fc``.

    Shapes: ``(N, 3, H, W) -> (N, num_classes)``; the encoder's vector, before ``fc``, has 2048 dimensions.

    Args:
        num_classes: outputs of ``fc``.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)
        )
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        before = 64
        for number, (channels, units) in enumerate(STAGES, start=2):
            first = TwoBranches(before, channels, stride=1 if number == 2 else 2)
            self.add_module(f"stage{number}", nn.Sequential(first, *(Split(channels) for _ in range(units - 1))))
            before = channels
        self.conv6 = nn.Sequential(*_pointwise(before, 2048))
        self.fc = nn.Linear(2048, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.maxpool(self.conv1(images))
        for number in range(2, 2 + len(STAGES)):
            maps = self.get_submodule(f"stage{number}")(maps)
        logits: Tensor = self.fc(reduce(self.conv6(maps), "n c h w -> n c", "mean"))
        return logits


def shufflenet_v2_50(num_classes: int = 1000) -> ShuffleNetV2Large:
    """ShuffleNet v2-50 for images of 224 pixels: 2.3G multiply-accumulates, 16.5M parameters.

    The paper's stages end after ``stage2``, ``stage3``, ``stage4`` and ``conv6``. Neither squeeze-and-excitation nor
    residual connections: those belong to the deeper v2-164.

    Args:
        num_classes: outputs of ``fc``.

    Example:
        >>> import torch
        >>> shufflenet_v2_50().stage2(torch.zeros(2, 64, 56, 56)).shape
        torch.Size([2, 244, 56, 56])
    """
    return ShuffleNetV2Large(num_classes)


class Split(nn.Module):
    """Half of the channels pass as they are, the other half through 1x1, depthwise 3x3 and 1x1 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = _branch(channels // 2, channels // 2, stride=1)

    def forward(self, maps: Tensor) -> Tensor:
        kept, changed = maps.chunk(2, dim=1)
        return _shuffled(kept, self.branch(changed))


class TwoBranches(nn.Module):
    """Changes width or size: all channels go through both branches."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        half = channels // 2
        self.shortcut = nn.Sequential(*_depthwise(before, stride), *_pointwise(before, half))
        self.branch = _branch(before, half, stride)

    def forward(self, maps: Tensor) -> Tensor:
        return _shuffled(self.shortcut(maps), self.branch(maps))


def _branch(before: int, half: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*_pointwise(before, half), *_depthwise(half, stride), *_pointwise(half, half))


def _pointwise(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
    ]


def _shuffled(first: Tensor, second: Tensor) -> Tensor:
    """Joins two branches so that their channels alternate: each half of what follows sees both."""
    return rearrange(torch.stack((first, second), dim=2), "n c two h w -> n (c two) h w")
