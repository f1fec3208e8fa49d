"""What each piece of a backbone costs by itself, counted in one forward of two inputs: what predictions are made of."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from math import inf, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from locallearn._fitting.attach import Decoder, attach
from locallearn._fitting.batches import rows
from locallearn._fitting.chain import Form, Link, links
from locallearn._fitting.features import Features
from locallearn._fitting.outlets import Outlet
from locallearn._walk.gradients import Accumulate
from locallearn._walk.recompute import Run
from locallearn._walk.segment import cut
from locallearn._walk.trees import mapped, tensors
from locallearn._walk.undo import attached
from locallearn.memory.between import Between, between
from locallearn.memory.count import Flops, storages
from locallearn.memory.scaled import ScaledBytes
from locallearn.plan import Plan, Unit
from locallearn.sharing import Hard


class Piece(NamedTuple):
    """A block, or a run of simple layers, between two places where a backbone can be cut. Sizes are in bytes.

    Attributes:
        end: the submodule after which it ends.
        shape: of its outlet.
        flops: of its forward.
        outlet: size of its outlet.
        kept: what its graph keeps alive after the forward, the outlet included and the inlet not.
        held: what the backbone's own variables keep alive beside that, until its forward goes on.
        forward: the most that is alive during its forward, beside what was before.
        pull: likewise during a backward to the inlet only, which retains the graph; with the gradient that comes in.
        push: likewise during the last backward, to weights and inlet.
        train: the most that a decoder on its outlet takes from its forward to the end of its backward, beside the outlet;
            infinite where the decoder does not fit.
        decoder_flops: of that decoder's forward.
        weights: how many numbers are trained in it.
    """

    end: str
    shape: torch.Size
    flops: int
    outlet: int
    kept: int
    held: int
    forward: int
    pull: int
    push: int
    train: float
    decoder_flops: int
    weights: int


class _Mark(NamedTuple):
    at: int  # in the history of live bytes
    flops: int


class Sample:
    """One forward of two inputs, in eval mode and without a trace, whose graph is kept as long as this object.

    Sizes and FLOPs are those of as many inputs as ``batch`` has.

    Args:
        model: the backbone.
        batch: what it is to be weighed for.
        cuts: submodules after which links end in any case.
        features: what decoders read where a submodule returns several tensors.
        disturb: ``True`` to run it in the modes that it has, and to leave what that changes, as in a copy. In eval mode what only
            training makes (masks of dropout) does not count.

    Attributes:
        inputs: the two; all that there are, where the batch axis cannot be told, as in a graph with its edges.
        rows: how many, or ``None``.
        chain: what lies between places at which ``model`` can be cut.
        misfits: why a decoder does not fit outlets of a shape.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        cuts: Sequence[str] = (),
        features: Features | None = None,
        *,
        disturb: bool = False,
    ) -> None:
        length = rows(batch)
        self.inputs = batch if length is None else mapped(lambda tensor: _two(tensor, length), batch)
        self.rows = rows(self.inputs)
        varying = [
            tensor for tensor in tensors(self.inputs) if self.rows is None or (tensor.ndim and len(tensor) == self.rows)
        ]
        self._first = varying[0]
        self._live, self._counter = ScaledBytes(varying, (length or 1) / (self.rows or 1)), Flops()
        self.misfits: dict[torch.Size, str] = {}
        marks: list[_Mark] = []  # where the backbone's forward begins and ends

        def mark(*_: object) -> None:
            marks.append(self._mark())

        around = attached({model: mark}, {model: mark})
        with around, around, self._counter, self._live:
            self.chain = links(model, self.inputs, self._mark, cuts, features or Features(), disturb=disturb)
        self._shapes = tuple(weight.shape for weight in model.parameters())
        self._start, self._end = marks[0], marks[-1]
        self._backwards: dict[object, tuple[int, int]] = {}  # of pieces that are alike
        self._decoders: dict[object, tuple[float, int]] = {}

    def _mark(self) -> _Mark:
        return _Mark(len(self._live.history) - 1, self._counter.total)

    def pieces(self, ends: Sequence[Link], runs: Collection[Run]) -> tuple[list[Piece], list[Piece]]:
        """What lies between ``ends``, as it is and with ``runs`` recomputed; without decoders, whose fields are 0."""
        plain, lean = list[Piece](), list[Piece]()
        below: Link | None = None
        for link in ends:
            piece = self._piece(link, below, frozen=not any(known.weights for known in plain))
            within = self.chain[0 if below is None else self.chain.index(below) + 1 : self.chain.index(link) + 1]
            again = _recomputed(within, runs) and piece.kept > piece.outlet
            plain.append(piece)
            lean.append(self._recomputed(piece, link, below) if again else piece)
            below = link
        return plain, lean

    def _piece(self, link: Link, below: Link | None, *, frozen: bool) -> Piece:
        """``frozen``: whether nothing is trained below."""
        history, part = self._history(link, below), between(link, below)
        weights = part.weights
        outlet, shape = sum(map(self._size, link.forms)), self._shape(link.outlet)
        flops = link.noted.flops - (self._start if below is None else below.noted).flops
        spent, forward = int(flops * self._live.factor), max(history) - history[0]
        held = self._live.history[link.noted.at] - history[-1]
        trained = sum(weight.numel() for weight in weights)
        if frozen and not weights:  # there is no graph
            return Piece(link.end, shape, spent, outlet, outlet, held, forward, outlet, outlet, 0.0, 0, 0)
        kept = history[-1] - history[0]
        alike = (shape, spent, kept, forward, tuple(weight.shape for weight in weights), below and below.forms)
        if alike not in self._backwards:
            self._backwards[alike] = self._backward(part)
        pull, push = (kept + more for more in self._backwards[alike])
        return Piece(link.end, shape, spent, outlet, kept, held, forward, pull, push, 0.0, 0, trained)

    def _recomputed(self, piece: Piece, link: Link, below: Link | None) -> Piece:
        """Keeps its outlet; a backward makes its graph again, and the outlet if that is saved, and frees it on the way."""
        largest = max(after - before for before, after in pairwise(self._history(link, below)))
        backward = piece.push + (
            piece.outlet if any(hasattr(type(place.node), "_saved_result") for place in link.places) else 0
        )
        forward = min(piece.forward, piece.outlet + 2 * largest)  # without a graph
        return piece._replace(kept=piece.outlet, pull=backward, push=backward, forward=forward)

    def _history(self, link: Link, below: Link | None) -> list[int]:
        begin = self._start if below is None else below.noted
        return self._live.history[self._settled(begin) : self._settled(link.noted) + 1]

    def _settled(self, mark: _Mark) -> int:
        """When what the call that has ended kept alive is freed."""
        at, history = mark.at, self._live.history
        while at < self._end.at and history[at + 1] < history[at]:
            at += 1
        return at

    def decoded(self, piece: Piece, link: Link, decoder: Decoder, axis: int | None) -> Piece:
        """``piece``, which ends at ``link``, with what ``decoder`` takes there."""
        alike = (link.outlet, link.axis)
        if alike not in self._decoders:
            self._decoders[alike] = self._decode(link, decoder, axis)
        takes, spent = self._decoders[alike]
        return piece._replace(train=takes, decoder_flops=spent)

    def _decode(self, link: Link, decoder: Decoder, axis: int | None) -> tuple[float, int]:
        features = self.like(link.outlet)
        outlet = Outlet(features, None, self._shapes, axis=link.axis)
        gpu = [features.device] if features.is_cuda else []
        with torch.random.fork_rng(gpu, device_type="cuda"):
            try:
                (module,) = attach(decoder, Plan(1, [Unit(0, 0)]), Hard(), [outlet], axis)
            except ValueError as error:
                self.misfits[link.outlet.shape] = str(error)
                return inf, 0
            return self.train(module, features)

    def like(self, form: Form) -> Tensor:
        """A tensor of that form, which grows with the inputs."""
        with self._live:
            return self._first.new_ones(form.shape, dtype=form.dtype, device=form.device)

    def whole(self, link: Link) -> Any:
        """All that is returned at the end of ``link``, of tensors like those."""
        return tree_map(
            lambda leaf: self.like(leaf) if isinstance(leaf, Form) else leaf,
            link.whole,
            is_leaf=lambda leaf: isinstance(leaf, Form),
        )

    def train(self, decoder: nn.Module, features: Any) -> tuple[int, int]:
        """The most bytes that ``decoder`` takes beside the outlet that it reads, and the FLOPs of its forward."""
        weights = [weight for weight in decoder.parameters() if weight.requires_grad]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        self._live.expect_gradients(weights)
        begin = self._mark()
        begun = mapped(
            lambda tensor: tensor.requires_grad_(tensor.is_floating_point() or tensor.is_complex()), features
        )
        inlets, read = cut(begun, differentiable=True)
        with self._counter, self._live:
            outputs = tree_leaves(decoder(read))
            del read
            end = self._mark()
            root = torch.stack([output.square().sum() for output in outputs if isinstance(output, Tensor)]).sum()
            del outputs
            Accumulate().push([root], weights, inlets)
        peak = max(self._live.history[begin.at :]) - self._live.history[begin.at]
        return peak, int((end.flops - begin.flops) * self._live.factor)

    def _backward(self, part: Between) -> tuple[int, int]:
        """What a backward to the inlets, and then the last one, take beside the graph."""
        rest = sum(map(self._size, part.rest))
        pull = self._peak(part, part.inlets, retain=True) + rest if part.inlets else 0
        self._live.expect_gradients(part.weights)
        return pull, self._peak(part, [*part.inlets, *part.weights], retain=False) + rest

    def _peak(self, part: Between, inputs: Sequence[Any], *, retain: bool) -> int:
        if not (part.outlets and inputs):
            return 0
        forms, places = zip(*part.outlets, strict=True)
        live, seed = self._live.history, sum(map(self._size, forms))
        begin, ends = len(live) - 1, [len(live) - 1]
        gradients = [self.like(form) for form in forms]
        known = [gradient.untyped_storage() for gradient in gradients]

        def used(below: Sequence[Tensor | None], _: object) -> None:
            """The walk frees what comes in here, unless it goes on; autograd.grad holds it to the end."""
            if not any(storage in known for g in below if g is not None for storage in storages(g)):
                ends.append(len(live) - 1)

        handles = [places[0].node.register_hook(used)] if len(places) == 1 else []
        with self._live:
            torch.autograd.grad(places, list(inputs), gradients, retain_graph=retain, allow_unused=True)
        for handle in handles:
            handle.remove()
        last = ends[1] if len(ends) > 1 else len(live) - 1
        return max([*live[begin : last + 1], *(now - seed for now in live[last + 1 :])]) - live[begin]

    def _shape(self, form: Form) -> torch.Size:
        return torch.Size((int(form.shape[0] * self._live.factor), *form.shape[1:])) if form.shape else form.shape

    def _size(self, form: Form) -> int:
        return prod(self._shape(form)) * form.dtype.itemsize


def _two(tensor: Tensor, length: int) -> Tensor:
    """The first two inputs in a tensor that has an axis for them, which is as long as the batch."""
    if not tensor.ndim or len(tensor) != length:
        return tensor
    return tensor[:2] if length > 1 else torch.cat([tensor, tensor])


def _recomputed(links: Sequence[Link], runs: Collection[Run]) -> bool:
    names = {name for run in runs for name in run}
    return any(link.block == name or link.block.startswith(f"{name}.") for link in links for name in names)
