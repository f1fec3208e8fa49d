"""A stem for small images, in place of ImageNet's."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

Backbone = TypeVar("Backbone", bound=nn.Module)


def small_image_stem(backbone: Backbone) -> Backbone:
    """Refits a backbone whose stem divides the image's size by 4 for images of 32 pixels, in place.

    ``conv1``, or the convolution that it begins with, becomes 3x3 with stride 1; ``maxpool`` passes what it gets (He et al.
    2016, Section 4.2). Fits torchvision's ResNets and ShuffleNets, and the backbones here.

    Args:
        backbone: has ``conv1`` and ``maxpool``.

    Returns:
        the backbone itself.

    Raises:
        ValueError: if it has no such stem.

    Example:
        >>> from torchvision.models import resnet18
        >>> small_image_stem(resnet18()).conv1
        Conv2d(3, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """
    conv1 = getattr(backbone, "conv1", None)
    first = conv1[0] if isinstance(conv1, nn.Sequential) else conv1
    if not isinstance(first, nn.Conv2d) or not isinstance(getattr(backbone, "maxpool", None), nn.Module):
        raise ValueError(
            f"a stem is a convolution 'conv1' and a 'maxpool'; {type(backbone).__name__} has "
            f"{[name for name, _ in backbone.named_children()]}. Build it for small images yourself"
        )
    convolution = nn.Conv2d(first.in_channels, first.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(conv1, nn.Sequential):
        conv1[0] = convolution
    else:
        backbone.add_module("conv1", convolution)
    backbone.add_module("maxpool", nn.Identity())
    return backbone
