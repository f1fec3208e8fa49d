"""The networks that the examples train, by name: how each is built, and after which submodules its stages end."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from einops import reduce
from inputs.image_sets import DataError
from torch import Tensor, nn
from torchvision.models import get_model

from locallearn import LocalWrapper
from locallearn._fitting.channels import agreed_axis
from locallearn._fitting.features import Features
from locallearn._fitting.outlets import Outlet, probe
from locallearn.command_line.backbones import FORMS, load
from locallearn.command_line.cutting import planned
from locallearn.command_line.errors import CommandError, nearest
from locallearn.command_line.parsing import DECODERS as FITTING
from locallearn.models import presnet50, presnet_small, resnet_cifar, shufflenet_v2_50, small_image_stem

FEATURES = Features()  # what is read of an outlet of several tensors
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


NAMES = f"{', '.join(ARCHITECTURES)}; or {FORMS}"
MOST_STAGES = 4  # where the planner chooses them


def named(text: str) -> str:
    """A type for arguments: a name in `ARCHITECTURES`, or of another backbone, a file's by its whole path."""
    kind, _, rest = text.rpartition(":")
    if text in ARCHITECTURES or (rest and kind in ("torchvision", "timm", "hf")):
        return text
    if rest and kind.endswith(".py"):
        return f"{Path(kind).resolve()}:{rest}"
    raise argparse.ArgumentTypeError(f"expected {NAMES}, got {text!r}{nearest(text, ARCHITECTURES)}")


def short(name: str) -> str:
    """A backbone's name as part of a file's."""
    return re.sub(r"[^\w.-]+", "_", Path(name).name)


def architecture(name: str, stages: Sequence[str] | None = None) -> Architecture:
    """A backbone by its name, cut after `stages`, or where it has always been. Raises `DataError` for a name without such."""
    if name in ARCHITECTURES:
        known = ARCHITECTURES[name]
        return replace(known, stages=tuple(stages)) if stages else known
    if not stages or ":" not in name:
        raise DataError(f"there is no backbone {name!r}: there are {NAMES}")
    return Architecture(partial(_of_elsewhere, name), tuple(stages))


def cut(name: str, image_size: int, stages: Sequence[str] | None = None) -> tuple[Architecture, str]:
    """The same, with the name of a decoder that fits; stages that nobody has said are chosen as `locallearn plan` does.

    They are chosen for LoCo whatever the method, so that all methods are compared on the same. Raises `DataError` for a
    backbone that is not there, or cannot be cut so.
    """
    if name in ARCHITECTURES and not stages:
        return ARCHITECTURES[name], "conv"
    make = ARCHITECTURES[name].make if name in ARCHITECTURES else partial(_of_elsewhere, name)
    backbone, example = make(image_size), torch.rand(64, 3, image_size, image_size)
    problems: list[Exception] = []
    if not stages:
        for count in range(MOST_STAGES, 1, -1):
            try:
                found, decoder = planned(name, backbone, example, None, n=count, overlap=1)
            except CommandError as problem:
                problems.append(problem)
            else:
                return Architecture(make, found.stages), decoder
    for decoder, kind in FITTING.items() if stages else ():
        try:
            LocalWrapper(backbone, list(stages or ()), 0, kind, example=example[:2])
        except (ValueError, TypeError) as problem:
            problems.append(problem)
        else:
            return Architecture(make, tuple(stages or ())), decoder
    raise DataError(_said(problems[0])) from problems[0]


def _said(problem: Exception) -> str:
    text, another_batch, _ = str(problem).partition(". If it ")  # what follows is advice for other callers
    return text + (". Images of another size: --image-size" if another_batch else "")


def _of_elsewhere(name: str, image_size: int) -> nn.Module:
    try:
        return load(name, image_size).model
    except CommandError as problem:
        raise DataError(str(problem)) from problem


class StageFeatures:
    """Each stage's outlet for a batch, averaged over its positions: `[(N, C_k), ...]`; the last is the encoder's vector.

    Of tokens that is the mean of all. Which axis of an outlet holds the channels is found as LocalWrapper does, for the first
    batch.
    """

    def __init__(self, backbone: nn.Module, stages: tuple[str, ...]) -> None:
        self._backbone, self._stages = backbone, stages
        self._axes: list[int | None] | None = None

    def __call__(self, images: Tensor) -> list[Tensor]:
        if self._axes is None:
            self._axes = [outlet.axis for outlet in told_apart(self._backbone, self._stages, images[:2])]
        pooled: list[Tensor] = []

        def keep(module: nn.Module, args: object, outlet: object) -> None:
            pooled.append(averaged(outlet, self._axes[len(pooled)]))

        handles = [self._backbone.get_submodule(stage).register_forward_hook(keep) for stage in self._stages]
        try:
            with torch.no_grad():
                self._backbone(images)
        finally:
            for handle in handles:
                handle.remove()
        return pooled


def averaged(outlet: object, axis: int) -> Tensor:
    """The mean over all positions of what a stage hands on, `(N, C)`, its channels in axis 1 or -1."""
    return reduce(FEATURES(outlet), "n c ... -> n c" if axis == 1 else "n ... c -> n c", "mean")


def told_apart(backbone: nn.Module, stages: tuple[str, ...], images: Tensor) -> list[Outlet]:
    """What each stage hands on, for images that leave no trace, with the axis of its channels, 1 or -1.

    Raises `DataError` where the backbone does not run on such images, or cannot be cut there.
    """
    try:
        found = probe(backbone, stages, images.clone())
        return [outlet._replace(axis=outlet.axis or agreed_axis(outlet.features, outlet.weights)) for outlet in found]
    except (ValueError, TypeError) as problem:
        raise DataError(_said(problem)) from problem
