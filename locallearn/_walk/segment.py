"""One stage's private graph, from its inlet to its outlet: where the backbone is cut, and how a gradient gets through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class _Alias(torch.autograd.Function):
    """The identity. Unlike a leaf, its result may be changed in place: a stage may begin with ``ReLU(inplace=True)``."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Seed(torch.autograd.Function):
    """A scalar whose backward starts ``outlet``'s with the gradient in ``box``.

    ``torch.autograd.grad(outlet, ..., grad_outputs=gradient)`` would keep the gradient alive until it returns. Taken out
    of the box, it is freed by the engine as soon as the stage's last operation has used it.
    """

    @staticmethod
    def forward(ctx: Any, outlet: Tensor, box: list[Tensor]) -> Tensor:
        ctx.box = box
        return (
            outlet.new_zeros((), dtype=outlet.dtype.to_real()) if outlet.is_complex() else outlet.new_zeros(())
        )  # a backward starts from a real number

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.box.pop(), None


def cut(outlet: Tensor, *, differentiable: bool) -> tuple[Tensor | None, Tensor]:
    """Cuts the graph after ``outlet``: this is just ``outlet.detach()``, or a copy that a graph may keep.

    Returns:
        the leaf that gathers the gradient from above (``None`` if nobody asks for it), and the tensor to go on with.
    """
    leaf = outlet.clone() if outlet.is_inference() and not torch.is_inference_mode_enabled() else outlet.detach()
    if not (differentiable and outlet.requires_grad):
        return None, leaf
    leaf.requires_grad_()
    return leaf, _Alias.apply(leaf)


def leaves(root: Tensor) -> list[Tensor]:
    """The tensors with ``requires_grad`` at which the graph of ``root`` begins.

    Raises:
        RuntimeError: if reentrant checkpointing hides a part of the graph.
    """
    if root.grad_fn is None:
        return [root] if root.requires_grad else []
    found: list[Tensor] = []
    seen = {root.grad_fn}
    stack = [root.grad_fn]
    while stack:
        node = stack.pop()
        kind = type(node).__name__
        if kind == "AccumulateGrad":
            found.append(node.variable)  # type: ignore[attr-defined]
        elif kind == "CheckpointFunctionBackward":
            raise RuntimeError(
                "reentrant checkpointing hides its weights from the graph. Use torch.utils.checkpoint.checkpoint(..., "
                "use_reentrant=False)"
            )
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                stack.append(below)
    return found


class Segment:
    """A stage between its forward and its last use.

    Attributes:
        outlet: what the stage returned, with the stage's graph.
        inlet: the leaf at which that graph begins, or ``None`` where no unit asks for the gradient there.
        weights: the trainable tensors in between.
    """

    def __init__(self, outlet: Tensor, inlet: Tensor | None) -> None:
        self.outlet = outlet
        self.inlet = inlet
        self.weights = [leaf for leaf in leaves(outlet) if leaf is not inlet]
        self._version = version(outlet)

    def changed(self) -> bool:
        """Whether an in-place operation has overwritten the outlet since the stage returned it."""
        return version(self.outlet) != self._version

    def seed(self, box: list[Tensor]) -> Tensor:
        """A scalar from which a backward through the stage starts, with the gradient in ``box`` at the outlet."""
        seeded: Tensor = _Seed.apply(self.outlet, box)
        return seeded

    def pull(self, box: list[Tensor], *, retain: bool) -> list[Tensor]:
        """Takes the gradient at the outlet, returns the one at the inlet, and computes no weight gradients."""
        assert self.inlet is not None
        (gradient,) = torch.autograd.grad(self.seed(box), self.inlet, retain_graph=retain, allow_unused=True)
        return [] if gradient is None else [gradient]


@contextmanager
def unchanged(outlet: Tensor, who: str) -> Iterator[None]:
    """Refuses what changes ``outlet`` in place.

    Raises:
        RuntimeError: at the end, if it was changed.
    """
    before = version(outlet)
    yield
    if version(outlet) != before:
        raise RuntimeError(
            f"{who} changes the outlet that it reads in place, but the next stage still needs it. Begin with an operation "
            "that is not in place, such as ReLU(inplace=False)"
        )


def version(tensor: Tensor) -> int:
    """How often ``tensor`` was changed in place; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version
