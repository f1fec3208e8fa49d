"""Progressive ResNets: six stages that share memory and computation about evenly (Section 4.4, Tables 6 and 8).

Maps shrink by bilinear interpolation, a little at each stage, where a ResNet halves them with a strided convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from locallearn.models.progressive import Basic, Bottleneck, Stage


class PResNet(nn.Module):
    """A ResNet of any number of stages, with submodules named as torchvision's: ``conv1`` ... ``layer1`` ... ``fc``.

    Shapes: ``(N, 3, H, W) -> (N, num_classes)``; the encoder's vector, before ``fc``, has the last stage's width.

    Args:
        stem: the first convolution.
        maxpool: what follows it, its normalisation and its ReLU.
        stages: from bottom to top; they become ``layer1``, ``layer2``, ...
        num_classes: outputs of ``fc``.
        zero_init_residual: start the last BatchNorm of every residual branch at zero, so that a block starts as its
            shortcut (Goyal et al. 2017, Section 5.1; SimCLR's recipe).
    """

    def __init__(
        self,
        stem: nn.Conv2d,
        maxpool: nn.Module,
        stages: Sequence[Stage],
        *,
        num_classes: int,
        zero_init_residual: bool = True,
    ) -> None:
        super().__init__()
        self.conv1 = stem
        self.bn1 = nn.BatchNorm2d(stem.out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = maxpool
        self._layers = [f"layer{number}" for number in range(1, len(stages) + 1)]
        channels = stem.out_channels
        for name, stage in zip(self._layers, stages, strict=True):
            self.add_module(name, _layer(channels, stage, zero_init_residual))
            channels = stage.channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        maps = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for name in self._layers:
            maps = self.get_submodule(name)(maps)
        logits: Tensor = self.fc(self.avgpool(maps).flatten(1))
        return logits


def presnet50(num_classes: int = 1000, *, literal: bool = False, zero_init_residual: bool = True) -> PResNet:
    """PResNet-50 for images of 224 pixels: maps of 56, 36, 24, 16, 12 and 8 pixels, a vector of 4096 dimensions.

    4.16G multiply-accumulates and, stage by stage, Table 6's column of FLOPs. That needs the last 1x1 convolution of all
    blocks dense in layer4 and layer5, where Table 8 has it grouped in blocks 2 and 3 (3.79G). The third stage has 144 base
    channels, as in the text, Table 8 and the FLOPs, although Table 6's column of memory only comes out with 128.

    Args:
        num_classes: outputs of ``fc``.
        literal: Table 8 to the letter.
        zero_init_residual: start the last BatchNorm of every residual branch at zero.

    Example:
        >>> import torch
        >>> presnet50().layer6(torch.zeros(2, 2048, 12, 12)).shape
        torch.Size([2, 4096, 8, 8])
    """
    fewer = 1 if literal else 3
    stages = [
        Stage(56),
        Stage(96, (9, 14)),
        Stage(144, (2, 3), expansion=4),
        Stage(256, (2, 3), expansion=4, groups=2, dense=fewer),
        Stage(512, (3, 4), expansion=4, groups=16, dense=fewer),
        Stage(1024, (2, 3), expansion=4, groups=128),
    ]
    stem = nn.Conv2d(3, 32, 7, stride=2, padding=3, bias=False)
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    return PResNet(stem, pool, stages, num_classes=num_classes, zero_init_residual=zero_init_residual)


def presnet_small(
    image_size: int = 32,
    *,
    width: int = 8,
    blocks: int = 1,
    num_classes: int = 10,
    zero_init_residual: bool = True,
) -> PResNet:
    """A progressive net for small images, whose six stages share the memory as those of PResNet-50 do.

    Images of 32 pixels give maps of 24, 16, 12, 8, 6 and 4; of 16 pixels half of that; of 96 pixels one and a half times as
    much. The encoder's vector has ``56 * width`` dimensions.

    Args:
        image_size: from 64 pixels on the stem has stride 2.
        width: base channels of the first stage, a multiple of 4; the last has 14 times as many.
        blocks: residual blocks in each stage (PResNet-50: 3).
        num_classes: outputs of ``fc``.
        zero_init_residual: start the last BatchNorm of every residual branch at zero.

    Raises:
        ValueError: if ``width`` is no multiple of 4, or ``image_size`` is below 8.

    Example:
        >>> import torch
        >>> presnet_small(32)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    if width < 4 or width % 4:
        raise ValueError(f"width is a multiple of 4, so that all stages' channels and groups are whole; got {width}")
    if image_size < 8:
        raise ValueError(f"six stages need images of at least 8 pixels; got image_size={image_size}")
    stages = [
        Stage(width, (3, 4)),
        Stage(width * 3 // 2, (2, 3)),
        Stage(width * 2, (3, 4), expansion=4),
        Stage(width * 7 // 2, (2, 3), expansion=4, groups=2),
        Stage(width * 7, (3, 4), expansion=4, groups=4),
        Stage(width * 14, (2, 3), expansion=4, groups=8),
    ]
    stem = nn.Conv2d(3, width, 3, stride=1 if image_size < 64 else 2, padding=1, bias=False)
    deep = [replace(stage, blocks=blocks) for stage in stages]
    return PResNet(stem, nn.Identity(), deep, num_classes=num_classes, zero_init_residual=zero_init_residual)


def _layer(before: int, stage: Stage, zero_init_residual: bool) -> nn.Sequential:
    layer = nn.Sequential()
    for number in range(stage.blocks):
        first = stage if number == 0 else replace(stage, size=(1, 1))
        block = Basic(before, first) if stage.expansion == 1 else Bottleneck(before, first, number < stage.dense)
        if zero_init_residual:
            nn.init.zeros_((block.bn2 if isinstance(block, Basic) else block.bn3).weight)
        layer.append(block)
        before = stage.channels
    return layer
