"""Which stage reads which weight and buffer: seen in the operations of one forward, not guessed from modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from locallearn._fitting.quiet import undisturbed
from locallearn._walk.cuts import hooked, submodules
from locallearn._walk.sameness import has_values
from locallearn._walk.trees import called, mapped


class Reading(NamedTuple):
    """What one forward of a whole backbone told.

    Attributes:
        stages: for each weight and buffer, the stages that read it; what runs after the last cut counts as one more.
        outlets: of every stage, detached.
    """

    stages: dict[Tensor, tuple[int, ...]]
    outlets: list[Any]


def reading(backbone: nn.Module, cuts: Sequence[str], batch: Any) -> Reading:
    """Runs ``backbone`` once, in eval mode and without a trace.

    What no operation reads belongs where most of its module does: counters of batch normalisation, a classifier that the
    forward leaves out.
    """
    tensors = [*backbone.parameters(), *backbone.buffers()]
    watch = _Reads(tensors)
    outlets: list[Any] = []

    def on_outlet(stage: int, output: Any) -> Any:
        watch.stage = stage + 1
        outlets.append(mapped(lambda tensor: tensor.detach().clone(), output))
        return output

    quiet, hooks = undisturbed(backbone), hooked(submodules(backbone, cuts), on_outlet)
    with quiet, quiet, hooks, hooks, torch.no_grad(), watch:
        called(backbone, mapped(lambda tensor: tensor.detach().clone(), batch))
    found = {tensor: tuple(sorted(watch.read[tensor])) for tensor in tensors if tensor in watch.read}
    for module in backbone.modules():
        of_module = [found[tensor] for tensor in _own(module) if tensor in found]
        for tensor in _own(module):
            found.setdefault(tensor, of_module[0] if of_module else (len(cuts),))
    return Reading(found, outlets)


def _own(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


class _Reads(TorchDispatchMode):
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.stage = 0
        self.read: dict[Tensor, set[int]] = {}
        self._at: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            if has_values(tensor) and tensor.numel():
                self._at.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if has_values(leaf):
                for tensor in self._at.get(leaf.untyped_storage().data_ptr(), ()):
                    self.read.setdefault(tensor, set()).add(self.stage)
        return func(*args, **(kwargs or {}))
