"""Stages share nothing but what passes the cut between them: found by what their graphs reach."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import ref

from torch import Tensor, nn

_SKIP = (
    "A skip connection crosses a cut beside the outlet. Move the cuts (stages=) so that both its ends lie in one stage, or end "
    "the last stage before the first one that takes it: of a U-Net, its encoder alone works. Or let every stage in between "
    "return it too, in a tuple; or freeze what makes it"
)
_SHARED = (
    "A weight belongs to one stage, or one unit's loss would reach into another through it. Move the cuts (stages=) so that "
    "both uses lie in one stage; or give each use a weight of its own (`nn.Parameter(weight.detach().clone())`, or deepcopy of "
    "the module); or freeze it: requires_grad_(False)"
)


class Isolation:
    """Notes who uses which weight and which inlet during one forward, and refuses what crosses a cut.

    Args:
        backbone: names the parameters in messages.
        cuts: the names of the stages' last modules, for messages.
    """

    def __init__(self, backbone: nn.Module, cuts: tuple[str, ...]) -> None:
        self._backbone = backbone
        self._cuts = cuts
        self._users: dict[Tensor, str] = {}
        self._inlets: dict[int, tuple[int, ref[Tensor]]] = {}  # by id; weak: an inlet is as large as an activation
        self._made = -1  # the number of the last node of the graphs that stages have ended with

    def opens(self, stage: int, inlets: Iterable[Tensor]) -> None:
        """The graph of ``stage`` begins at ``inlets``."""
        for inlet in inlets:
            self._inlets[id(inlet)] = stage, ref(inlet)

    def claim_stage(self, stage: int, weights: Iterable[Tensor], outlets: Sequence[Tensor] = ()) -> None:
        """``stage`` uses ``weights`` on the way to ``outlets``.

        Raises:
            ValueError: if one of them is another stage's, or is another stage's inlet.
        """
        self._claim(f"stage {stage} ({self._cuts[stage]!r})", weights, outlets)
        for outlet in outlets:
            if outlet.grad_fn is not None:
                self._made = max(self._made, outlet.grad_fn._sequence_nr())

    def claim_unit(self, weights: Iterable[Tensor]) -> None:
        """A decoder or a loss uses ``weights``; units may share them with each other, but not with the backbone."""
        self._claim("a decoder or a loss", weights, ())

    def _claim(self, user: str, weights: Iterable[Tensor], outlets: Sequence[Tensor]) -> None:
        crossing = [w for w in weights if self._is_inlet(w) or self._users.setdefault(w, user) != user]
        if crossing:
            inlets = {inlet: stage for stage, known in self._inlets.values() if (inlet := known()) is not None}
            raise ValueError(f"{user} uses {self._told(user, crossing, inlets, outlets)}")

    def _is_inlet(self, leaf: Tensor) -> bool:
        known = self._inlets.get(id(leaf))
        return known is not None and known[1]() is leaf

    def _told(self, user: str, crossing: Sequence[Tensor], inlets: dict[Tensor, int], outlets: Sequence[Tensor]) -> str:
        """What crosses a cut, and what to do."""
        activations = self._activations(user, outlets, inlets)
        direct = _met(outlets, self._made) if activations else crossing
        skips = [*activations]
        for weight in crossing:
            if weight in inlets and (not activations or any(weight is other for other in direct)):
                skips.append(f"the outlet of stage {inlets[weight] - 1} ({self._cuts[inlets[weight] - 1]!r})")
        shared = [
            f"{self._name(weight)}, which {self._users[weight]} uses too"
            for weight in crossing
            if weight not in inlets and any(weight is other for other in direct)
        ]
        found = list(dict.fromkeys([*skips, *shared]))
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        why = " ".join([_SKIP] * bool(skips) + [_SHARED] * bool(shared))
        return f"{'; '.join(found[:3])}{more}. {why}"

    def _activations(self, user: str, outlets: Sequence[Tensor], inlets: dict[Tensor, int]) -> list[str]:
        """What the graph of a stage takes from others, but for their outlets and weights."""
        found: list[str] = []
        for node in _older(outlets, self._made):
            below = _leaves(node)
            weights = [leaf for leaf in below if self._users.get(leaf, user) != user]
            stages = [inlets[leaf] for leaf in below if leaf in inlets]
            if weights:
                found.append(f"an activation{self._maker(weights)}, made in {self._users[weights[0]]}")
            elif stages and type(node).__name__ != "_AliasBackward":
                found.append(f"an activation made in stage {max(stages)} ({self._cuts[max(stages)]!r})")
        return list(dict.fromkeys(found))

    def _maker(self, weights: Sequence[Tensor]) -> str:
        """The largest submodule whose weights all are among these, and which has the first of them."""
        known = {id(weight) for weight in weights}
        name = next((name for name, weight in self._backbone.named_parameters() if weight is weights[0]), "")
        found = ""
        while name := name.rpartition(".")[0]:
            if all(id(w) in known for w in self._backbone.get_submodule(name).parameters() if w.requires_grad):
                found = f" of {name!r}"
        return found

    def _name(self, weight: Tensor) -> str:
        for name, parameter in self._backbone.named_parameters():
            if parameter is weight:
                return f"parameter {name!r}"
        return f"a trainable tensor of shape {tuple(weight.shape)}"


def _older(outlets: Sequence[Tensor], made: int) -> Iterator[Any]:
    """The first nodes on the way down from ``outlets`` that are no newer than ``made``."""
    for node in _down([outlet.grad_fn for outlet in outlets], made):
        if node._sequence_nr() <= made:
            yield node


def _met(outlets: Sequence[Tensor], made: int) -> list[Tensor]:
    """The leaves that newer nodes than ``made`` use, and those that a copy of an older stage's outlet stands for."""
    found = [outlet for outlet in outlets if outlet.grad_fn is None]
    for node in _down([outlet.grad_fn for outlet in outlets], made):
        if hasattr(node, "variable"):
            found.append(node.variable)
        elif type(node).__name__ == "_AliasBackward":
            found += _leaves(node)
    return found


def _down(roots: Sequence[Any], made: int) -> Iterator[Any]:
    """Nodes of a graph, those above first; what lies below a node that is no newer than ``made`` is left out."""
    seen = {root for root in roots if root is not None}
    level = list(seen)
    while level:
        above, level = level, []
        for node in above:
            yield node
            if node._sequence_nr() > made:
                below = [
                    function for function, _ in reversed(node.next_functions)
                ]  # weights, which come after inputs, first
                new = [function for function in below if function is not None and function not in seen]
                seen.update(new)
                level += new


def _leaves(node: Any) -> list[Tensor]:
    """Where the graph below ``node`` begins, the nearest first."""
    return [below.variable for below in _down([node], -1) if hasattr(below, "variable")]
