"""A feature pyramid on any backbone: which stages feed it, at what strides, and how much of the backbone is trained."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from math import log2
from typing import Literal

import torch
import torch.nn.functional as F
from backbones import FEATURES, told_apart
from inputs.image_sets import DataError
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

Mode = Literal["frozen", "finetune", "scratch"]

PROBE = 256  # pixels a side of the image that finds the stages' widths and strides


class Body(nn.Module):
    """A backbone's stages as maps whose strides are powers of two: 4, 8, 16 and 32 of a ResNet.

    Each level takes the stage whose stride is nearest; where it is not the level's own, as in a PResNet, whose maps shrink by
    less than two, the map is resized. Shapes: `(N, 3, H, W) -> {"0": (N, C_0, H/s, W/s), "1": (N, C_1, H/2s, W/2s), ...}`.

    Args:
        backbone: any; what follows its last stage runs, and is not trained.
        stages: submodules after which they end.
        mode: `frozen`: all of it, in eval mode for good, so that BatchNorm's statistics do not move either. `finetune`: what
            runs up to the end of the first stage (conv1 and res2) is. `scratch`: nothing is.

    Attributes:
        strides: of the levels.
        widths: of the levels.
    """

    def __init__(self, backbone: nn.Module, stages: tuple[str, ...], mode: Mode) -> None:
        super().__init__()
        self.backbone, self._mode = backbone, mode
        check_maps(backbone, stages, PROBE)
        outlets, lowest, reached = _probe(backbone, stages)
        sides = [outlet.shape[-1] for outlet in outlets]
        first, last = (round(log2(PROBE / side)) for side in (sides[0], sides[-1]))
        self.strides = tuple(2**power for power in range(first, last + 1))
        top_down = range(len(stages))[::-1]  # of two stages that are as near, the higher
        chosen = [min(top_down, key=lambda k: abs(log2(PROBE / sides[k] / stride))) for stride in self.strides]
        self._stages = [stages[k] for k in chosen]
        self.widths = [outlets[k].shape[1] for k in chosen]
        self._still = {"frozen": list(backbone.modules()), "finetune": lowest, "scratch": []}[mode]
        still = {id(weight) for module in self._still for weight in module.parameters(recurse=False)}
        for weight in backbone.parameters():
            weight.requires_grad_(id(weight) in reached and id(weight) not in still)

    def train(self, mode: bool = True) -> Body:
        super().train(mode)
        for module in self._still:
            module.training = False
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        outlets = outlets_of(self.backbone, self._stages, images)
        height, width = images.shape[2:]
        levels = zip(self.strides, outlets, strict=True)
        return OrderedDict(
            (str(k), _resized(outlet, (-(-height // stride), -(-width // stride))))
            for k, (stride, outlet) in enumerate(levels)
        )


class Pyramid(nn.Module):
    """A body, and the feature pyramid on it (Lin et al. 2017), normalised after each of its convolutions.

    Shapes: `(N, 3, H, W) -> {"0": (N, width, H/s, W/s), ..., "pool": ...}`, the last one at twice the coarsest stride.
    """

    def __init__(self, body: Body, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.widths, width, LastLevelMaxPool(), norm)
        self.out_channels = width

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.fpn(self.body(images))
        return maps


def check_maps(backbone: nn.Module, stages: tuple[str, ...], size: int) -> None:
    """Raises `DataError` where stages hand on other than maps with channels first, or do not take images of that size."""
    images = next(backbone.parameters()).new_zeros(2, 3, size, size)
    if any(outlet.axis != 1 or outlet.features.ndim != 4 for outlet in told_apart(backbone, stages, images)):
        raise DataError(
            f"detection and segmentation read maps (N, C, H, W); the stages of {type(backbone).__name__} hand on others"
        )


def outlets_of(backbone: nn.Module, stages: list[str], images: Tensor) -> list[Tensor]:
    """The stages' maps, of one forward."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, args, outlet: found.__setitem__(name, FEATURES(outlet))

    handles = [backbone.get_submodule(stage).register_forward_hook(keep(stage)) for stage in set(stages)]
    try:
        backbone(images)
    finally:
        for handle in handles:
            handle.remove()
    return [found[stage] for stage in stages]


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[2:] == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _probe(backbone: nn.Module, stages: tuple[str, ...]) -> tuple[list[Tensor], list[nn.Module], set[int]]:
    """The stages' outlets, the modules that ran up to the first one's end, and the ids of the weights that the last needs."""
    ran: list[nn.Module] = []
    lowest: list[nn.Module] = []
    handles = [m.register_forward_hook(lambda module, args, outlet: ran.append(module)) for m in backbone.modules()]
    end = backbone.get_submodule(stages[0])
    handles.append(end.register_forward_hook(lambda module, args, outlet: lowest.extend(ran)))
    training = {module: module.training for module in backbone.modules()}
    weights = list(backbone.parameters())
    required = [weight.requires_grad for weight in weights]
    try:
        backbone.eval().requires_grad_(True)
        outlets = outlets_of(backbone, list(stages), weights[0].new_zeros(1, 3, PROBE, PROBE))
        gradients = torch.autograd.grad(outlets[-1].sum(), weights, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
        for weight, requires in zip(weights, required, strict=True):
            weight.requires_grad_(requires)
    reached = {id(weight) for weight, gradient in zip(weights, gradients, strict=True) if gradient is not None}
    return outlets, lowest, reached
