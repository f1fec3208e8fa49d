"""How the paper counts: multiply-accumulates and feature maps of each stage, as in its Table 6."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class StageCount(NamedTuple):
    """What the paper counts of a stage, for one image.

    memory: elements of the maps that convolutions put out; those of the stem and of shortcuts are left out, and every map has
        the size of the stage's outlet.
    flops: multiply-accumulates of convolutions and linear layers, and 2 for every element that BatchNorm puts out; the
        stem belongs to the lowest stage, and what follows the last one (a classifier) to none.
    """

    memory: int
    flops: int


def paper_counts(backbone: nn.Module, stages: tuple[str, ...], image: Tensor) -> list[StageCount]:
    """Counts each stage of `backbone` for a batch of one image `(1, 3, S, S)`, which may be a fake tensor."""
    flops, channels, memory = [0] * (len(stages) + 1), [0] * (len(stages) + 1), [0] * len(stages)
    ended = 0  # stages so far

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, _BatchNorm):
            flops[ended] += 2 * output.numel()
        elif isinstance(module, nn.Conv2d):
            flops[ended] += output.numel() * module.weight[0].numel()
            if on_main_path[module] and not (ended == 0 and in_stem[module]):
                channels[ended] += output.shape[1]
        else:
            flops[ended] += output.numel() * args[0].shape[-1]

    def end_stage(module: nn.Module, args: object, outlet: Tensor) -> None:
        nonlocal ended
        memory[ended] = channels[ended] * outlet[0, 0].numel()
        ended += 1

    on_main_path, in_stem, handles = {}, {}, []
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | _BatchNorm):
            on_main_path[module] = not {"downsample", "shortcut"} & set(name.split("."))
            in_stem[module] = not name.startswith(stages[0] + ".")
            handles.append(module.register_forward_hook(count))
    handles += [backbone.get_submodule(stage).register_forward_hook(end_stage) for stage in stages]
    try:
        with torch.no_grad():
            backbone(image)
    finally:
        for handle in handles:
            handle.remove()
    return [StageCount(*counts) for counts in zip(memory, flops[:-1], strict=True)]


def shares(values: list[int]) -> list[float]:
    """Each value's part of the sum, in percent."""
    return [100 * value / sum(values) for value in values]
