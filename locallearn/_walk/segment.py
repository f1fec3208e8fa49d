"""One stage's private graph, from its inlet to its outlet: where the backbone is cut, and how a gradient gets through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from locallearn._walk.engine import grad
from locallearn._walk.trees import mapped, tensors

Flow: TypeAlias = list[Tensor | None]  # the gradients of a unit at the tensors of an outlet; empty if there are none


SMALL = 2**16  # bytes of gradients that may live until a backward has ended, since that is quicker


class _Alias(torch.autograd.Function):
    """The identity. Unlike a leaf, its result may be changed in place: a stage may begin with ``ReLU(inplace=True)``."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Seed(torch.autograd.Function):
    """A scalar whose backward starts that of ``outlets`` with the gradients in ``box``.

    ``torch.autograd.grad(outlets, ..., grad_outputs=gradients)`` would keep the gradients alive until it returns. Taken out
    of the box, each is freed by the engine as soon as the stage's last operation has used it.
    """

    @staticmethod
    def forward(ctx: Any, box: Flow, *outlets: Tensor) -> Tensor:
        ctx.box, first = box, outlets[0]
        return (
            first.new_zeros((), dtype=first.dtype.to_real()) if first.is_complex() else first.new_zeros(())
        )  # a backward starts from a real number

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None, *ctx.box)
        ctx.box.clear()
        return gradients


def cut(outlet: Any, *, differentiable: bool, onward: bool = True) -> tuple[list[Tensor], Any]:
    """Cuts the graph after ``outlet``: of a tensor this is just ``outlet.detach()``, or a copy that a graph may keep.

    Of several tensors, each that has a graph is cut; the rest stays what it is, and so does which of them are identical.

    Args:
        outlet: a tensor, or several of them in a pytree.
        differentiable: whether somebody asks for the gradients there.
        onward: whether the backbone goes on with what is handed on, and may change it in place, or is in inference mode, where
            no copy is needed. A decoder does neither.

    Returns:
        the leaves that gather the gradients from above, one for each of :func:`differentiable` tensors (none if nobody asks
        for them), and what to go on with.
    """
    if isinstance(outlet, Tensor):
        is_inference = outlet.is_inference()
        leaf = outlet.clone() if is_inference and not torch.is_inference_mode_enabled() else outlet.detach()
        if differentiable and outlet.requires_grad:
            leaf.requires_grad_()
            return [leaf], _Alias.apply(leaf) if onward else leaf
        return [], outlet if is_inference and onward else leaf
    leaves: list[Tensor] = []
    known: dict[Tensor, Tensor] = {}

    def one(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad and not tensor.is_inference():
            return tensor
        if tensor not in known:
            begins, known[tensor] = cut(tensor, differentiable=differentiable, onward=onward)
            leaves.extend(begins)
        return known[tensor]

    return leaves, mapped(one, outlet)


def differentiable(outlet: Any) -> list[Tensor]:
    """The tensors in ``outlet`` that have a graph, each once: those that :func:`cut` cuts."""
    if isinstance(outlet, Tensor):
        return [outlet] if outlet.requires_grad else []
    return [tensor for tensor in tensors(outlet) if tensor.requires_grad]


def leaves(*roots: Tensor, beyond: Sequence[Tensor] = ()) -> list[Tensor]:
    """The tensors with ``requires_grad`` at which the graphs of ``roots`` begin, without those that are listed in ``beyond``.

    Raises:
        RuntimeError: if reentrant checkpointing hides a part of a graph.
    """
    found: list[Tensor] = []
    stack: list[Any] = []
    for root in roots:
        if root.grad_fn is not None:
            stack.append(root.grad_fn)
        elif root.requires_grad:
            found.append(root)
    seen = set(stack)
    while stack:
        node = stack.pop()
        kind = type(node).__name__
        if kind == "AccumulateGrad":
            found.append(node.variable)
            continue
        if kind == "CheckpointFunctionBackward":
            raise RuntimeError(
                "reentrant checkpointing hides its weights from the graph. Use torch.utils.checkpoint.checkpoint(..., "
                "use_reentrant=False)"
            )
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                stack.append(below)
    if len(roots) == 1 and len(beyond) < 2:  # what nearly all stages are
        return [leaf for leaf in found if leaf is not beyond[0]] if beyond else found
    known = set(map(id, beyond))
    return [leaf for leaf in dict.fromkeys(found) if id(leaf) not in known]


class Segment:
    """A stage between its forward and its last use.

    Attributes:
        outlet: what the stage returned, with the stage's graph.
        outlets: the tensors in it that have a graph; a gradient at the outlet is a list of one for each, or ``None``.
        inlets: the leaves at which that graph begins; none where no unit asks for the gradients there.
        weights: the trainable tensors in between.
    """

    def __init__(self, outlet: Any, inlets: Sequence[Tensor]) -> None:
        self.outlet = outlet
        self.outlets = differentiable(outlet)
        self.inlets = inlets
        self.weights = leaves(*self.outlets, beyond=inlets)
        self._versions = versions(outlet)

    def changed(self) -> bool:
        """Whether an in-place operation has overwritten the outlet since the stage returned it."""
        return versions(self.outlet) != self._versions

    def let_go(self) -> None:
        """Forgets the outlet, and with it the graph."""
        del self.outlet, self.outlets

    def start(self, box: Flow) -> tuple[Sequence[Tensor], list[Tensor] | None]:
        """From what a backward through the stage starts, for torch.autograd: its outlets, and the gradients in ``box``.

        If those are large it is a scalar, which takes them out of the box.
        """
        roots, gradients = self.outlets, [gradient for gradient in box if gradient is not None]
        if len(gradients) < len(box):
            roots = [outlet for outlet, gradient in zip(roots, box, strict=True) if gradient is not None]
        if sum(gradient.nbytes for gradient in gradients) > SMALL:
            box[:] = gradients
            del gradients
            return (_Seed.apply(box, *roots),), None
        box.clear()
        return roots, gradients

    def pull(self, box: Flow, *, retain: bool) -> Flow:
        """Takes the gradients at the outlets, returns those at the inlets, and computes no weight gradients."""
        assert self.inlets
        roots, gradients = self.start(box)
        return flow(grad(roots, gradients, self.inlets, retain=retain))


def flow(gradients: Sequence[Tensor | None]) -> Flow:
    """A list of ``gradients``, empty where there are none."""
    for gradient in gradients:
        if gradient is not None:
            return list(gradients)
    return []


def added(one: Flow, other: Flow) -> Flow:
    """The sum of gradients at the same tensors; an empty list is no gradient at all."""
    if not (one and other):
        return [*one, *other]
    return [b if a is None else a if b is None else a + b for a, b in zip(one, other, strict=True)]


def overlapping(outlet: Any) -> list[tuple[Tensor, int]]:
    """The tensors in ``outlet`` that have a graph and may share elements with another of them, with their versions.

    Each by itself is cut from what it is a view of: a change in place of one would not be known to the other's graph.
    """
    found: dict[Tensor, None] = {}
    spans: dict[int, list[tuple[int, int, Tensor]]] = {}  # by memory: from which byte to which
    for tensor in differentiable(outlet):
        if tensor.layout == torch.strided and tensor.numel():
            first = tensor.storage_offset()
            last = first + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            span = int(first) * tensor.itemsize, int(last + 1) * tensor.itemsize, tensor
            others = spans.setdefault(tensor.untyped_storage()._cdata, [])
            for start, end, other in others:
                if start < span[1] and span[0] < end:
                    found |= {other: None, tensor: None}
            others.append(span)
    return [(tensor.detach(), version(tensor)) for tensor in found]


@contextmanager
def unchanged(outlet: Any, who: str) -> Iterator[None]:
    """Refuses what changes ``outlet`` in place.

    Raises:
        RuntimeError: at the end, if it was changed.
    """
    before = versions(outlet)
    yield
    if versions(outlet) != before:
        raise changes_outlet(who)


def changes_outlet(who: str) -> RuntimeError:
    return RuntimeError(
        f"{who} changes the outlet that it reads in place, but the next stage still needs it. Begin with an operation "
        "that is not in place, such as ReLU(inplace=False)"
    )


def versions(outlet: Any) -> int | list[int]:
    """:func:`version` of every tensor in ``outlet``."""
    if isinstance(outlet, Tensor):
        return 0 if outlet.is_inference() else outlet._version
    return [version(tensor) for tensor in tensors(outlet)]


def version(tensor: Tensor) -> int:
    """How often ``tensor`` was changed in place; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version
