"""A backbone as a chain: the submodules, in the order in which they run, after which nothing goes on but what they return."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrize import ParametrizationList

from locallearn._fitting.channels import Channels
from locallearn._fitting.features import Features
from locallearn._fitting.outlets import failure
from locallearn._fitting.quiet import undisturbed
from locallearn._walk.segment import cut, version
from locallearn._walk.trees import called, mapped, tensors
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
        follows: whether ``block`` takes the outlet below, one tensor, and nothing else.
        outlet: the form of what decoders read of it.
        whole: all that is returned, with forms in place of tensors.
        forms: those of all tensors in it that have a graph.
        places: theirs in the graph, which lives as long as a link does.
        owners: what keeps it alive where a function of Python's made one of them, whose node does not.
        axis: of the channels of ``outlet``, if a module says it.
        noted: what ``note()`` returned at the end.
    """

    end: str
    block: str
    follows: bool
    outlet: Form
    whole: Any
    forms: tuple[Form, ...]
    places: tuple[GradientEdge, ...]
    owners: tuple[Any, ...]
    axis: int | None
    noted: Any


class _Call(NamedTuple):
    name: str
    inlet: int | None  # the number of the only argument, if it is one tensor
    outlet: int  # of what is read
    read: Form
    whole: Any
    forms: tuple[Form, ...]
    places: tuple[GradientEdge, ...]
    owners: tuple[Any, ...]
    noted: Any
    passes: bool  # hands on what it was given, as Dropout does in eval mode


def links(
    backbone: nn.Module,
    batch: Any,
    note: Callable[[], object] = lambda: None,
    cuts: Sequence[str] = (),
    features: Features | None = None,
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
        features: what decoders read where a submodule returns several tensors. Such places are found too, if it is given.
        disturb: ``True`` to run it in the modes that it has, and to leave what that changes, as in a copy.

    Raises:
        ValueError: if the forward fails.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 2))
        >>> [link.end for link in links(net, torch.zeros(2, 4))]
        ['0', '1.0', '1', '2']
    """
    forward = _Forward(backbone, batch, note, features, disturb=disturb)
    return forward.chain(forward.calls[-1], cuts) if forward.calls else []


def longest(backbone: nn.Module, batch: Any, features: Features | None = None) -> list[Link]:
    """The most links one after another that lead to the outlet of any call: those of a U-Net's encoder, for instance."""
    forward = _Forward(backbone, batch, lambda: None, features, disturb=False)
    return max((forward.chain(call) for call in forward.calls), key=len, default=[])


class _Forward:
    """Every call of a submodule that returns tensors with a graph, in the order in which they end; no tensor is kept."""

    def __init__(
        self, backbone: nn.Module, batch: Any, note: Callable[[], object], features: Features | None, *, disturb: bool
    ) -> None:
        apart = {part for module in backbone.modules() if _apart(module) for part in module.modules()}
        names = {module: name for name, module in backbone.named_modules() if name and module not in apart}
        inlets: dict[nn.Module, list[tuple[int | None, int]]] = {}
        self.calls: list[_Call] = []
        self._dropouts = {name for module, name in names.items() if isinstance(module, _DropoutNd)}
        self._channels = channels = Channels(backbone)

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            inlets.setdefault(module, []).append((channels.number(args[0]), version(args[0])) if alone else (None, 0))

        def leave(module: nn.Module, args: Any, output: object) -> None:
            inlet, before = inlets[module].pop()
            read = _read(output, features)
            if read is None:
                return
            linked = [tensor for tensor in tensors(output) if tensor.grad_fn is not None]
            places = tuple(GradientEdge(tensor.grad_fn, tensor.output_nr) for tensor in linked)  # type: ignore[arg-type]
            owners = tuple(_owner(tensor) for tensor in linked if isinstance(tensor.grad_fn, torch._C._FunctionBase))
            number = channels.number(read)
            passes = number == inlet and version(read) == before
            forms = tuple(map(_form, linked))
            self.calls.append(
                _Call(
                    names[module],
                    inlet,
                    number,
                    _form(read),
                    mapped(_form, output),
                    forms,
                    places,
                    owners,
                    note(),
                    passes,
                )
            )

        hooks, heard = attached(dict.fromkeys(names, enter), dict.fromkeys(names, leave)), channels.heard()
        quiet = undisturbed(*([] if disturb else [backbone]))
        with quiet, quiet, heard, heard, hooks, hooks, torch.enable_grad():
            weights = list(backbone.parameters())
            trained = bool(weights) and all(weight.requires_grad for weight in weights)
            begun = mapped(lambda tensor: _begun(tensor, graph=not trained), batch)
            self._begin = channels.number(begun) if isinstance(begun, Tensor) else -1
            try:
                called(backbone, begun)
            except Exception as error:
                if disturb:
                    raise
                raise ValueError(failure(backbone, (), batch, error)) from error

    def chain(self, last: _Call, cuts: Sequence[str] = ()) -> list[Link]:
        """The links that lead to the outlet of ``last``."""
        alive, often = _Alive(last.places), Counter(call.name for call in self.calls)
        passed = {call.outlet for call in self.calls if call.passes}
        ending: dict[frozenset[GradientEdge], list[_Call]] = {}
        for call in sorted(self.calls, key=lambda call: call.passes):
            key = frozenset(call.places)
            if often[call.name] == 1 and (not call.passes or (key not in ending and call.name in self._dropouts)):
                ending.setdefault(key, []).append(call)
        chain: list[Link] = []
        below: int | None = self._begin
        for places, inner_first in sorted(ending.items(), key=lambda item: _made(item[0])):
            if not alive.alone(places) and not any(call.name in cuts for call in inner_first):
                continue
            end = next((call for call in inner_first if call.name in cuts), inner_first[-1])
            uncut = [call for call in inner_first if not any(link.end.startswith(f"{call.name}.") for link in chain)]
            block = uncut[-1] if uncut else inner_first[0]
            follows = block.inlet is not None and block.inlet == below and below not in passed
            axis = self._channels.axis(end.read.shape, end.outlet)
            chain.append(
                Link(
                    end.name,
                    block.name,
                    follows,
                    end.read,
                    end.whole,
                    end.forms,
                    end.places,
                    end.owners,
                    axis,
                    end.noted,
                )
            )
            below = end.outlet if len(places) == 1 else None
        return chain


def _read(output: object, features: Features | None) -> Tensor | None:
    """The tensor that a decoder reads of ``output``, if there is one, with a graph."""
    if isinstance(output, Tensor) or features is None:
        return output if isinstance(output, Tensor) and output.grad_fn is not None else None
    try:
        read = features(output)
    except Exception:  # noqa: BLE001 - most submodules return something else than those at which stages will end
        return None
    return read if read.grad_fn is not None else None


def _owner(tensor: Tensor) -> Any:
    """A node above the tensor's own, which keeps no tensor. See torch.autograd.graph.get_gradient_edge's ownership token."""
    with torch.enable_grad():
        return tensor.view_as(tensor).grad_fn


def _form(tensor: Tensor) -> Form:
    return Form(tensor.shape, tensor.dtype, tensor.device)


def _begun(tensor: Tensor, *, graph: bool) -> Tensor:
    """A copy that a graph may begin with, and that is no leaf, which may not be changed in place."""
    images = tensor.detach().clone()
    return cut(images.requires_grad_(), differentiable=True)[1] if graph and images.is_floating_point() else images


def _apart(module: nn.Module) -> bool:
    """Whether it takes no hooks, or computes a weight and nothing of the inputs."""
    return isinstance(module, torch.jit.ScriptModule | ParametrizationList)


def _made(places: Iterable[GradientEdge]) -> int:
    return max(place.node._sequence_nr() for place in places)


class _Alive:
    """From when until when each tensor that leads to ``ends`` is needed, as numbers of nodes."""

    def __init__(self, ends: Sequence[GradientEdge]) -> None:
        stack = list({end.node: None for end in ends})
        seen = set(stack)
        self._until: dict[GradientEdge, float] = dict.fromkeys(ends, float("inf"))
        since: dict[GradientEdge, int] = {end: _made([end]) for end in ends}
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

    def alone(self, places: frozenset[GradientEdge]) -> bool:
        """Whether, once ``places`` are made, nothing else from before is needed, but some of them."""
        made = _made(places)
        alive = bisect_right(self._starts, made) - bisect_right(self._stops, made)
        return alive == sum(self._until.get(place, made) > made for place in places) > 0
