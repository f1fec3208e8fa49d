"""The networks that the examples train, by name: how each is built, and after which submodules its stages end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from einops import reduce
from torch import Tensor, nn
from torchvision.models import get_model

LARGEST_SMALL_IMAGE = 64  # pixels; up to here a stem without stride takes the place of ImageNet's, which divides by 4


@dataclass(frozen=True)
class Architecture:
    """How a backbone is built for images of a size, and where it is cut."""

    make: Callable[[int], nn.Module]
    stages: tuple[str, ...]


def _resnet(image_size: int, name: str) -> nn.Module:
    backbone = get_model(name)
    if image_size <= LARGEST_SMALL_IMAGE:
        backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)  # He et al. 2016, section 4.2
        backbone.maxpool = nn.Identity()
    return backbone


LAYERS = ("layer1", "layer2", "layer3", "layer4")
ARCHITECTURES = {
    name: Architecture(partial(_resnet, name=name), LAYERS) for name in ("resnet18", "resnet34", "resnet50")
}


def stage_features(backbone: nn.Module, stages: tuple[str, ...], images: Tensor) -> list[Tensor]:
    """Each stage's outlet for a batch, averaged over its positions: `[(N, C_k), ...]`; the last is the encoder's vector."""
    pooled: list[Tensor] = []

    def keep(module: nn.Module, args: object, outlet: Tensor) -> None:
        pooled.append(reduce(outlet, "n c ... -> n c", "mean"))

    handles = [backbone.get_submodule(stage).register_forward_hook(keep) for stage in stages]
    try:
        with torch.no_grad():
            backbone(images)
    finally:
        for handle in handles:
            handle.remove()
    return pooled
