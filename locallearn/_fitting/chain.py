"""A backbone as a chain: the submodules, in the order in which they run, after which exactly one tensor goes on."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from locallearn._fitting.channels import Channels
from locallearn._fitting.outlets import failure
from locallearn._fitting.quiet import undisturbed
from locallearn._walk.segment import cut, version
from locallearn._walk.undo import attached


class Form(NamedTuple):
    """A tensor without its numbers."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Link(NamedTuple):
    """What runs between two neighbouring places at which a backbone can be cut.

    Attributes:
        end: the outermost submodule that returns the link's outlet: the name of a cut.
        block: the largest submodule that ends there and could not be cut inside.
        follows: whether ``block`` takes the outlet below, and nothing else.
        outlet: its form.
        place: a node of the graph and which of its outputs; the graph lives as long as a link does.
        axis: of the outlet's channels, if a module says it.
        noted: what ``note()`` returned at the end.
    """

    end: str
    block: str
    follows: bool
    outlet: Form
    place: GradientEdge
    axis: int | None
    noted: Any


class _Call(NamedTuple):
    name: str
    inlet: int | None  # the number of the only argument, if it is one tensor
    outlet: int
    form: Form
    place: GradientEdge
    noted: Any
    passes: bool  # hands on what it was given, as Dropout does in eval mode


def links(
    backbone: nn.Module,
    batch: Tensor,
    note: Callable[[], object] = lambda: None,
    cuts: Sequence[str] = (),
    *,
    disturb: bool = False,
) -> list[Link]:
    """Runs ``backbone`` once, in eval mode and without a trace, and finds every place where one tensor passes.

    Such a place is the end of a submodule's call after which nothing that was made or used before is needed any more, but
    the outlet: no other tensor, and no weight a second time. The graph tells: its nodes are numbered as they are made.
    Needed is what leads to the outlet of the last call; what comes behind that (a list of maps, an object) is not looked at.

    Args:
        backbone: where to look.
        batch: what it takes.
        note: called at the end of every submodule.
        cuts: submodules after which links end in any case.
        disturb: ``True`` to run it in the modes that it has, and to leave what that changes, as in a copy.

    Raises:
        ValueError: if the forward fails.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 2))
        >>> [link.end for link in links(net, torch.zeros(2, 4))]
        ['0', '1.0', '1', '2']
    """
    forward = _Forward(backbone, batch, note, disturb=disturb)
    return forward.chain(forward.calls[-1], cuts) if forward.calls else []


def longest(backbone: nn.Module, batch: Tensor) -> list[Link]:
    """The most links one after another that lead to the outlet of any call: those of a U-Net's encoder, for instance."""
    forward = _Forward(backbone, batch, lambda: None, disturb=False)
    return max((forward.chain(call) for call in forward.calls), key=len, default=[])


class _Forward:
    """Every call of a submodule that returns one tensor with a graph, in the order in which they end; no tensor is kept."""

    def __init__(self, backbone: nn.Module, batch: Tensor, note: Callable[[], object], *, disturb: bool) -> None:
        scripted = {part for module in backbone.modules() if _scripted(module) for part in module.modules()}
        names = {module: name for name, module in backbone.named_modules() if name and module not in scripted}
        inlets: dict[nn.Module, list[tuple[int | None, int]]] = {}
        self.calls: list[_Call] = []
        self._channels = channels = Channels(backbone)

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            inlets.setdefault(module, []).append((channels.number(args[0]), version(args[0])) if alone else (None, 0))

        def leave(module: nn.Module, args: Any, output: object) -> None:
            inlet, before = inlets[module].pop()
            if not isinstance(output, Tensor) or output.grad_fn is None:
                return
            outlet, form = channels.number(output), Form(output.shape, output.dtype, output.device)
            place = GradientEdge(output.grad_fn, output.output_nr)
            passes = outlet == inlet and version(output) == before
            self.calls.append(_Call(names[module], inlet, outlet, form, place, note(), passes))

        hooks, heard = attached(dict.fromkeys(names, enter), dict.fromkeys(names, leave)), channels.heard()
        quiet = undisturbed(*([] if disturb else [backbone]))
        with quiet, quiet, heard, heard, hooks, hooks, torch.enable_grad():
            images = batch.detach().clone()
            weights = list(backbone.parameters())
            if images.is_floating_point() and not (weights and all(weight.requires_grad for weight in weights)):
                images = cut(images.requires_grad_(), differentiable=True)[1]  # a graph where the weights make none
            self._begin = channels.number(images)
            try:
                backbone(images)
            except Exception as error:
                if disturb:
                    raise
                raise ValueError(failure(backbone, (), batch, error)) from error

    def chain(self, last: _Call, cuts: Sequence[str] = ()) -> list[Link]:
        """The links that lead to the outlet of ``last``."""
        alive, often = _Alive(last.place), Counter(call.name for call in self.calls)
        passed = {call.outlet for call in self.calls if call.passes}
        ending: dict[GradientEdge, list[_Call]] = {}
        for call in sorted(self.calls, key=lambda call: call.passes):
            if often[call.name] == 1 and (not call.passes or call.place not in ending):
                ending.setdefault(call.place, []).append(call)
        chain: list[Link] = []
        below = self._begin
        for place, inner_first in sorted(ending.items(), key=lambda item: _made(item[0])):
            if not alive.alone(place) and not any(call.name in cuts for call in inner_first):
                continue
            whole = next((call for call in inner_first if call.name in cuts), inner_first[-1])
            uncut = [call for call in inner_first if not any(link.end.startswith(f"{call.name}.") for link in chain)]
            block = uncut[-1] if uncut else inner_first[0]
            follows = block.inlet == below and below not in passed
            axis = self._channels.axis(whole.form.shape, whole.outlet)
            chain.append(Link(whole.name, block.name, follows, whole.form, place, axis, whole.noted))
            below = whole.outlet
        return chain


def _scripted(module: nn.Module) -> bool:
    """Whether it takes no hooks."""
    return isinstance(module, torch.jit.ScriptModule)


def _made(place: GradientEdge) -> int:
    return place.node._sequence_nr()


class _Alive:
    """From when until when each tensor that leads to ``end`` is needed, as numbers of nodes."""

    def __init__(self, end: GradientEdge) -> None:
        stack = [end.node]
        seen = set(stack)
        self._until: dict[GradientEdge, float] = {end: float("inf")}
        since: dict[GradientEdge, int] = {end: _made(end)}
        while stack:
            node = stack.pop()
            now = node._sequence_nr()
            for below, index in node.next_functions:
                if below is None:
                    continue
                place, leaf = GradientEdge(below, index), type(below).__name__ == "AccumulateGrad"
                self._until[place] = max(now, self._until.get(place, now))
                since[place] = min(now, since.get(place, now)) if leaf else below._sequence_nr()
                if below not in seen:
                    seen.add(below)
                    stack.append(below)
        self._starts, self._stops = sorted(since.values()), sorted(self._until.values())

    def alone(self, place: GradientEdge) -> bool:
        """Whether, once ``place`` is made, nothing else from before is needed."""
        made = _made(place)
        alive = bisect_right(self._starts, made) - bisect_right(self._stops, made)
        return alive == 1 and self._until.get(place, made) > made
