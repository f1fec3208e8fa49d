"""Backbones to be wrapped: six real architectures, small and in float64, and modules that are awkward to cut."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import ConvNeXt, ShuffleNetV2, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import BasicBlock, ResNet

from locallearn import ConvMLPDecoder, MLPDecoder, TokenDecoder


class Specimen(NamedTuple):
    """A backbone, where to cut it, a decoder that fits, and the size of its images."""

    build: Callable[[], nn.Module]
    stages: list[str]
    decoder: Callable[[int], nn.Module]
    size: int

    def views(self, n: int = 4, count: int = 2) -> tuple[Tensor, ...]:
        return torch.rand(count, n, 3, self.size, self.size, dtype=torch.float64).unbind()


def conv(before: int, after: int, stride: int = 1, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=bias)


def sequential() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        nn.Sequential(conv(8, 8, 2), nn.Dropout(0.2), nn.ReLU()),
        nn.Sequential(conv(8, 16), nn.GroupNorm(4, 16), nn.GELU()),
        nn.Sequential(conv(16, 16, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 7),
    )


def small_net() -> nn.Sequential:
    """Three convolutions, for tests in which the backbone does not matter."""
    return nn.Sequential(conv(3, 4), conv(4, 4), conv(4, 4))


small = partial(MLPDecoder, out_features=16)
deep = partial(ConvMLPDecoder, out_features=16)
ZOO = {
    "resnet18": Specimen(
        lambda: ResNet(BasicBlock, [2, 2, 2, 2], num_classes=7), ["layer1", "layer2", "layer3", "layer4"], deep, 32
    ),
    "shufflenet": Specimen(
        lambda: ShuffleNetV2([2, 2, 2], [8, 16, 32, 64, 96], num_classes=7),
        ["stage2", "stage3", "stage4", "conv5"],
        deep,
        64,
    ),
    "convnext": Specimen(
        lambda: ConvNeXt(
            [CNBlockConfig(12, 24, 2), CNBlockConfig(24, 36, 1), CNBlockConfig(36, None, 1)],
            stochastic_depth_prob=0.3,
            num_classes=7,
        ),
        ["features.1", "features.3", "features.5"],
        deep,
        32,
    ),
    "swin": Specimen(
        lambda: SwinTransformer([4, 4], 12, [1, 1, 1], [2, 2, 2], [2, 2], stochastic_depth_prob=0.2, num_classes=7),
        ["features.1", "features.3", "features.5"],
        deep,
        32,
    ),
    "vit": Specimen(
        lambda: VisionTransformer(32, 8, 4, 2, 16, 32, dropout=0.1, num_classes=7),
        [f"encoder.layers.encoder_layer_{i}" for i in range(4)],
        partial(TokenDecoder, out_features=16),
        32,
    ),
    "sequential": Specimen(sequential, ["0", "1", "2", "3"], small, 16),
}


class Chain(nn.Module):
    """Three stages whose forward the subclasses spoil."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = conv(3, 4), conv(4, 4), conv(4, 4), conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(self.stem(x))))


class SkipOverCut(Chain):
    """The outlet of ``a`` is used again after the cut behind ``b``."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.stem(x))
        return self.c(self.b(x) + x)


class SkipFromInside(Chain):
    """A tensor from inside the first stage is used after the cut behind ``b``."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.c(self.b(self.a(h)) + h)


class RunsTwice(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.b(self.a(self.stem(x)))))


class OutOfOrder(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(self.b(self.stem(x))))


class SharedWeight(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.c.weight = self.a.weight


class SkipsAtRandom(Chain):
    """LayerDrop: the middle stage's second convolution runs in some training steps only."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = conv(4, 4)
        self.runs = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.stem(x))
        if self.runs:
            x = self.extra(x)
        return self.c(self.b(x))
