"""The part of a forward's graph that lies between two places at which the backbone can be cut, where nothing is cut yet."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from locallearn._fitting.chain import Form, Link


class Between(NamedTuple):
    """What a backward of one link goes through.

    Several tensors over a cut may be made one from another (the streams of a RevNet), and an outlet may hand on what was made
    further down. A backward through the whole graph would go on there, below the cut.

    Attributes:
        outlets: what is made here, its forms and places.
        inlets: what it is made from, without what another inlet is made from in turn.
        rest: the forms of these.
        weights: the trained ones that are used here.
    """

    outlets: list[tuple[Form, GradientEdge]]
    inlets: list[GradientEdge]
    rest: list[Form]
    weights: list[Tensor]


def between(link: Link, below: Link | None = None) -> Between:
    """What leads to the outlet of ``link``, above that of ``below``."""
    outlets = list(zip(link.forms, link.places, strict=True))
    known = [] if below is None else list(zip(below.forms, below.places, strict=True))
    ends = {place.node for _, place in known}
    above = _nodes([place.node for place in link.places], ends)
    met, under = above & ends, set[Any]()
    if len(outlets) > 1 or len(met) > 1:
        under = _nodes([lower for node in met for lower, _ in node.next_functions], ())
        outlets = [(form, place) for form, place in outlets if place.node not in under]
        above = _nodes([place.node for _, place in outlets], ends)
    inlets = [place for _, place in known if place.node in met - under]
    rest = [form for form, place in known if place.node in met & under]
    leaves = [getattr(node, "variable", None) for node in above - ends]
    weights: list[Tensor] = [
        leaf for leaf in leaves if isinstance(leaf, nn.Parameter)
    ]  # the inputs may be another leaf
    return Between(outlets, inlets, rest, weights)


def hands_on(link: Link, below: Link) -> bool:
    """Whether what ``link`` returns was made in part further down than what ``below`` returns, and is not among that."""
    ends = {place.node for place in below.places}
    others = {place.node for place in link.places} - ends
    return len(link.places) > 1 and not others.isdisjoint(
        _nodes([lower for node in ends for lower, _ in node.next_functions], ())
    )


def _nodes(tops: Sequence[Any], ends: Collection[Any]) -> set[Any]:
    """The graph's nodes from ``tops`` down to ``ends``, those included."""
    seen = {node for node in tops if node is not None}
    stack = list(seen)
    while stack:
        if (node := stack.pop()) not in ends:
            lower = {lower for lower, _ in node.next_functions if lower is not None} - seen
            seen |= lower
            stack += lower
    return seen
