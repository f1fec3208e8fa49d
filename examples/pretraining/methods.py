"""What is compared in the paper, by name: methods, decoders (Table 4), sharing (Table 5), losses; as LocalWrapper's arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from backbones import Architecture, StageFeatures
from inputs.images import DataError
from torch import nn

from locallearn import (
    ConvMLPDecoder,
    InfoNCE,
    LocalWrapper,
    MLPDecoder,
    PlainConvDecoder,
    Plan,
    Soft,
    TokenDecoder,
    UpperOnly,
)

METHODS = ("simclr", "gim", "loco")

DECODERS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": MLPDecoder,
    "mlp4": partial(MLPDecoder, depth=4),
    "conv-no-downsampling": partial(ConvMLPDecoder, stride=1),
    "conv": ConvMLPDecoder,
    "conv2": partial(ConvMLPDecoder, blocks=2),
    "conv+mlp4": partial(ConvMLPDecoder, depth=4),
    "grid": partial(MLPDecoder, grid=2),  # not in Table 4: CLAPP++'s
    "1c2f": PlainConvDecoder,  # nor this: DGL's
    "tokens": TokenDecoder,  # nor this: of transformers
}
DEPTHS: dict[str, int | None] = {"stage": 1, "network": None}  # how many of the stages above a decoder repeats

SHARINGS = ("none", "upper", "soft-1e-4", "soft-1e-3", "soft-1e-2", "first-block", "first-2-blocks", "hard")

LOSSES = {
    "nt-xent": partial(InfoNCE, form="nt-xent"),  # SimCLR's
    "one-way": partial(InfoNCE, form="one-way"),  # the paper's equation (1)
    "two-way": partial(InfoNCE, form="two-way"),
    "supcon": partial(InfoNCE, form="nt-xent"),  # with labels: images of a class are positives
}
LABELLED = ("supcon",)


class Scope(NamedTuple):
    """How far each loss reaches: the backbone's cuts, the plan, and the penalty that soft sharing adds."""

    stages: tuple[str, ...]
    plan: Plan
    soft: Soft | None = None


def overlap_of(method: str, stages: int) -> int:
    """How many stages neighbouring units share."""
    return {"simclr": stages - 1, "gim": 0, "loco": 1}[method]


def scope(backbone: nn.Module, stages: tuple[str, ...], overlap: int, sharing: str) -> Scope:
    """A row of Table 5. Raises `DataError` for one that the overlap or the backbone does not have."""
    if not 0 <= overlap < len(stages):
        raise DataError(f"--overlap is between 0 and {len(stages) - 1} for {len(stages)} stages, got {overlap}")
    count = len(stages)
    if sharing == "hard":
        return Scope(stages, Plan.windows(count, overlap))
    if overlap != 1 and not (sharing == "upper" and overlap):
        raise DataError(
            f"--sharing {sharing} is a way to share one stage, as loco does; it does not go with overlap {overlap}"
        )
    if sharing == "none":
        return Scope(stages, Plan.windows(count, overlap=0))
    if sharing == "upper":
        return Scope(stages, UpperOnly().plan(count, overlap))
    if sharing.startswith("soft-"):
        soft = Soft(float(sharing.removeprefix("soft-")))
        return Scope(stages, soft.plan(count, overlap), soft)
    blocks = {"first-block": 1, "first-2-blocks": 2}[sharing]
    finer = [stages[0]]
    for stage in stages[1:]:
        names = [name for name, _ in backbone.get_submodule(stage).named_children()]
        if not isinstance(backbone.get_submodule(stage), nn.Sequential) or len(names) <= blocks:
            raise DataError(
                f"--sharing {sharing} cuts each stage after {blocks} of its blocks; {stage} has {len(names)}. "
                "To share a whole stage is --sharing hard"
            )
        finer += [f"{stage}.{names[blocks - 1]}", stage]
    return Scope(tuple(finer), Plan.first_blocks(count))


def seeded(make: Callable[[int], nn.Module], seed: int) -> Callable[[int], nn.Module]:
    """`make`, with the same initial weights for a width in all methods, however many decoders were made before."""

    def decoder(width: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make(width)

    return decoder


def copied_stages(architecture: Architecture, image_size: int, above: int, count: int | None) -> nn.Module:
    """A decoder as deep as the `count` stages above stage `above` (all: None), then an MLP ("1 stage", "full network").

    It is made of the same blocks as those stages, with weights of its own. The top stage has none above it; its decoder is
    the one with a convolution block.
    """
    network = architecture.make(image_size).eval()
    example = torch.zeros(2, 3, image_size, image_size)
    widths = [features.shape[1] for features in StageFeatures(network, architecture.stages)(example)]
    top = len(widths) - 1 if count is None else min(above + count, len(widths) - 1)
    if above == top:
        return ConvMLPDecoder(widths[top])
    children = [name for name, _ in network.named_children()]
    try:
        first, last = (children.index(architecture.stages[stage]) for stage in (above, top))
    except ValueError as nested:
        raise DataError(
            "--decoder stage and network repeat a backbone's own submodules; its stages are deeper ones"
        ) from nested
    layers = [network.get_submodule(name) for name in children[first + 1 : last + 1]]
    return nn.Sequential(*layers, MLPDecoder(widths[top])).train()


def wrapped(
    backbone: nn.Module,
    architecture: Architecture,
    image_size: int,
    *,
    overlap: int,
    decoder: str = "conv",
    sharing: str = "hard",
    loss: str = "nt-xent",
    temperature: float = 0.1,
    seed: int = 0,
) -> LocalWrapper:
    """The backbone, wrapped for a method.

    Raises `DataError` for combinations that do not exist.
    """
    stages, plan, soft = scope(backbone, architecture.stages, overlap, sharing)
    decoders: Callable[[int], nn.Module] | list[nn.Module]
    if decoder in DECODERS:
        decoders = seeded(DECODERS[decoder], seed)
    elif soft is None and len(stages) == len(architecture.stages):
        make = seeded(lambda stage: copied_stages(architecture, image_size, stage, DEPTHS[decoder]), seed)
        decoders = [make(unit.last) for unit in plan.units]
    else:
        raise DataError(
            f"--decoder {decoder} is for units that end with a stage; it does not go with --sharing {sharing}"
        )
    losses = LOSSES[loss](temperature)
    weight = next(backbone.parameters())
    example = torch.zeros(2, 3, image_size, image_size, device=weight.device, dtype=weight.dtype)
    if soft is not None:
        return LocalWrapper(backbone, stages, overlap, decoders, loss=losses, sharing=soft, example=example)
    return LocalWrapper(backbone, stages, decoder=decoders, loss=losses, plan=plan, example=example)
