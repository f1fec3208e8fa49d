"""The networks that the examples train, by name: how each is built, and after which submodules its stages end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from einops import reduce
from torch import Tensor, nn
from torchvision.models import get_model

from locallearn.models import presnet50, presnet_small, resnet_cifar, shufflenet_v2_50, small_image_stem

LARGEST_SMALL_IMAGE = 64  # pixels; up to here a stem without stride takes the place of ImageNet's, which divides by 4


@dataclass(frozen=True)
class Architecture:
    """How a backbone is built for images of a size, and where it is cut."""

    make: Callable[[int], nn.Module]
    stages: tuple[str, ...]


def _stem_for(image_size: int, backbone: nn.Module) -> nn.Module:
    return small_image_stem(backbone) if image_size <= LARGEST_SMALL_IMAGE else backbone


def _resnet(image_size: int, name: str) -> nn.Module:
    return _stem_for(image_size, get_model(name, zero_init_residual=True))


def _presnet50(image_size: int, literal: bool) -> nn.Module:
    return _stem_for(image_size, presnet50(literal=literal))


def _shufflenet(image_size: int) -> nn.Module:
    return _stem_for(image_size, shufflenet_v2_50())


def _resnet_cifar(image_size: int, depth: int) -> nn.Module:
    return resnet_cifar(depth)


CIFAR_DEPTHS = {"resnet20": 20, "resnet32": 32, "resnet110": 110}  # He et al.'s, for 32 pixels
RESNET = ("layer1", "layer2", "layer3", "layer4")
PRESNET = (*RESNET, "layer5", "layer6")
ARCHITECTURES = {
    **{name: Architecture(partial(_resnet, name=name), RESNET) for name in ("resnet18", "resnet34", "resnet50")},
    **{name: Architecture(partial(_resnet_cifar, depth=depth), RESNET[:3]) for name, depth in CIFAR_DEPTHS.items()},
    "presnet50": Architecture(partial(_presnet50, literal=False), PRESNET),
    "presnet50-literal": Architecture(partial(_presnet50, literal=True), PRESNET),  # Table 8 to the letter
    "presnet_small": Architecture(presnet_small, PRESNET),
    "presnet_small-3": Architecture(partial(presnet_small, blocks=3), PRESNET),  # blocks per stage, as in PResNet-50
    "shufflenet_v2_50": Architecture(_shufflenet, ("stage2", "stage3", "stage4", "conv6")),
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
