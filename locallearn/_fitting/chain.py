"""A backbone as a chain: the submodules, in the order in which they run, after which exactly one tensor goes on."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from locallearn._fitting.quiet import undisturbed
from locallearn._walk.segment import cut, version
from locallearn._walk.trees import called, mapped
from locallearn._walk.undo import attached

Place: TypeAlias = tuple[Any, int]  # a node of the graph, and which of its outputs


class Link(NamedTuple):
    """What runs between two neighbouring places at which a backbone can be cut.

    Attributes:
        end: the outermost submodule that returns the link's outlet: the name of a cut.
        block: the largest submodule that ends there and could not be cut inside.
        follows: whether ``block`` takes the outlet below, and nothing else.
        shape: of the outlet.
    """

    end: str
    block: str
    follows: bool
    shape: torch.Size


class _Call(NamedTuple):
    name: str
    inlet: Tensor | None  # the only argument, if it is one tensor
    outlet: Tensor
    place: Place
    made: int


def links(backbone: nn.Module, batch: Any) -> list[Link]:
    """Runs ``backbone`` once, in eval mode and without a trace, and finds every place where one tensor passes.

    Such a place is the end of a submodule's call after which nothing that was made or used before is needed any more, but
    the outlet: no other tensor, and no weight a second time. The graph tells: its nodes are numbered as they are made.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 2))
        >>> [link.end for link in links(net, torch.zeros(2, 4))]
        ['0', '1.0', '1', '2']
    """
    scripted = {
        part for module in backbone.modules() if _scripted(module) for part in module.modules()
    }  # take no hooks
    names = {module: name for name, module in backbone.named_modules() if name and module not in scripted}
    inlets: dict[nn.Module, list[tuple[Tensor | None, int]]] = {}
    calls: list[_Call] = []
    passed: list[Tensor] = []  # what a module handed on as it was, as Dropout does in eval mode

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        inlets.setdefault(module, []).append((args[0], version(args[0])) if alone else (None, 0))

    def leave(module: nn.Module, args: Any, output: object) -> None:
        inlet, before = inlets[module].pop()
        if not isinstance(output, Tensor) or output.grad_fn is None:
            return
        if output is inlet and version(output) == before:
            passed.append(output)
            return
        place, made = (output.grad_fn, output.output_nr), output.grad_fn._sequence_nr()
        calls.append(_Call(names[module], inlet, output, place, made))

    quiet, hooks = undisturbed(backbone), attached(dict.fromkeys(names, enter), dict.fromkeys(names, leave))
    with quiet, quiet, hooks, hooks, torch.enable_grad():
        images = mapped(_begun, batch)
        result = called(backbone, images)
    return _chain(calls, _Alive(result), images, passed)


def _begun(tensor: Tensor) -> Tensor:
    """A copy that a graph begins with, and that is no leaf, which may not be changed in place."""
    images = tensor.detach().clone()
    return cut(images.requires_grad_(), differentiable=True)[1] if images.is_floating_point() else images


def _scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def _chain(calls: list[_Call], alive: _Alive, below: Any, passed: list[Tensor]) -> list[Link]:
    often = {call.name for call in calls if sum(other.name == call.name for other in calls) > 1}
    ending: dict[Place, list[_Call]] = {}
    for call in calls:
        if call.name not in often:
            ending.setdefault(call.place, []).append(call)
    chain: list[Link] = []
    for place, inner_first in sorted(ending.items(), key=lambda item: item[1][0].made):
        if not alive.alone(place, inner_first[0].made):
            continue
        whole = inner_first[-1]
        uncut = [call for call in inner_first if not any(link.end.startswith(f"{call.name}.") for link in chain)]
        block = uncut[-1] if uncut else inner_first[0]
        follows = block.inlet is below and not any(tensor is below for tensor in passed)
        chain.append(Link(whole.name, block.name, follows, whole.outlet.shape))
        below = whole.outlet
    return chain


class _Alive:
    """From when until when each tensor of a graph is needed, as numbers of nodes."""

    def __init__(self, result: object) -> None:
        ends = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.grad_fn is not None]
        stack = [end.grad_fn for end in ends]
        seen = set(stack)
        self._until: dict[Place, float] = {}
        since: dict[Place, int] = {}
        while stack:
            node = stack.pop()
            assert node is not None
            now = node._sequence_nr()
            for below, index in node.next_functions:
                if below is None:
                    continue
                place, leaf = (below, index), type(below).__name__ == "AccumulateGrad"
                self._until[place] = max(now, self._until.get(place, now))
                since[place] = min(now, since.get(place, now)) if leaf else below._sequence_nr()
                if below not in seen:
                    seen.add(below)
                    stack.append(below)
        for end in ends:
            self._until[end.grad_fn, end.output_nr] = float("inf")
            since[end.grad_fn, end.output_nr] = end.grad_fn._sequence_nr()  # type: ignore[union-attr]
        self._starts, self._stops = sorted(since.values()), sorted(self._until.values())

    def alone(self, place: Place, made: int) -> bool:
        """Whether, once ``place`` is made, nothing else from before is needed."""
        alive = bisect_right(self._starts, made) - bisect_right(self._stops, made)
        return alive == 1 and self._until.get(place, made) > made
