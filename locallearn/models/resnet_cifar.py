"""He et al.'s ResNets for images of 32 pixels (6n + 2 layers), whose every block can be a stage of its own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ResNetCifar(nn.Module):
    """Three layers of ``n`` basic blocks, with submodules named as torchvision's: ``conv1 ... layer1 ... layer3 ... fc``.

    Shapes: ``(N, 3, H, W) -> (N, num_classes)``; the encoder's vector, before ``fc``, has ``4 * width`` dimensions.

    Args:
        blocks: of each layer.
        width: channels of the stem and the first layer; each further layer doubles them and halves the maps.
        num_classes: outputs of ``fc``.
    """

    def __init__(self, blocks: int, *, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _layer(width, width, blocks, stride=1)
        self.layer2 = _layer(width, 2 * width, blocks, stride=2)
        self.layer3 = _layer(2 * width, 4 * width, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        maps = self.relu(self.bn1(self.conv1(images)))
        maps = self.layer3(self.layer2(self.layer1(maps)))
        logits: Tensor = self.fc(self.avgpool(maps).flatten(1))
        return logits


def resnet_cifar(depth: int = 20, width: int = 16, *, num_classes: int = 10) -> ResNetCifar:
    """ResNet-20, -32, -44, -56, -110 ... for images of 32 pixels (He et al. 2016, Section 4.2): ``depth`` is ``6n + 2``.

    Maps of 32, 16 and 8 pixels; shortcuts without parameters (their option A). :func:`resnet_cifar_stages` names where
    others cut it.

    Args:
        depth: layers with weights, the stem and the classifier among them.
        width: channels of the first layer; 16 in the paper.
        num_classes: outputs of ``fc``.

    Raises:
        ValueError: if ``depth`` is not 8, 14, 20, 26, 32, ...

    Example:
        >>> import torch
        >>> net = resnet_cifar(20)
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> sum(weight.numel() for weight in net.parameters())  # 0.27M in the paper
        269722
    """
    return ResNetCifar(_blocks(depth), width=width, num_classes=num_classes)


def resnet_cifar_stages(depth: int, count: int) -> tuple[str, ...]:
    """Names of the submodules that cut :func:`resnet_cifar` into ``count`` stages, as even as its blocks allow.

    The stem and the blocks are ``6n / 2 + 1`` pieces in a row; the cut above stage ``k`` comes after
    ``floor(pieces * (k + 1) / count)`` of them. That is how InfoPro (Wang et al. 2021) cuts ResNet-32 into 2, 4, 8 and 16,
    and ResNet-110 into 4 and 8. With as many stages as blocks, each block is one, the stem being part of the first.

    Args:
        depth: of the network.
        count: how many stages, from 1 to one more than there are blocks (the stem alone is the first then).

    Raises:
        ValueError: for a count or a depth that does not exist.

    Example:
        >>> resnet_cifar_stages(32, 4)
        ('layer1.2', 'layer2.1', 'layer3.0', 'layer3.4')
        >>> resnet_cifar_stages(20, 9)[:4]
        ('layer1.0', 'layer1.1', 'layer1.2', 'layer2.0')
    """
    blocks = [f"layer{layer}.{block}" for layer in (1, 2, 3) for block in range(_blocks(depth))]
    pieces = ["relu", *blocks]
    if not 1 <= count <= len(pieces):
        raise ValueError(f"ResNet-{depth} has a stem and {len(blocks)} blocks: 1 to {len(pieces)} stages; got {count}")
    if count == len(blocks):
        return tuple(blocks)
    return tuple(pieces[len(pieces) * (k + 1) // count - 1] for k in range(count))


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which takes every second pixel and fills up with zeros where it must."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.stride, self.new_channels = stride, after - before

    def forward(self, maps: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(maps)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1 or self.new_channels:
            maps = F.pad(maps[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        out += maps
        result: Tensor = self.relu(out)
        return result


def _layer(before: int, after: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(before, after, stride)
    return nn.Sequential(first, *(Block(after, after, 1) for _ in range(blocks - 1)))


def _blocks(depth: int) -> int:
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"the depth is 6n + 2: 8, 14, 20, 26, 32, 44, 56, 110, ...; got {depth}")
    return (depth - 2) // 6
