"""Where a local pass puts its gradients: into ``.grad`` at once, or aside until an ordinary ``loss.backward()``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from locallearn._walk.engine import backward, grad
from locallearn._walk.segment import Flow, flow
from locallearn._walk.undo import Reverted
from locallearn.distributed import Reduction, in_use


class Accumulator(Protocol):
    """Runs a backward from ``roots``, at which the gradients are ``gradients``, or from one scalar, into ``weights``."""

    def push(
        self,
        roots: Sequence[Tensor],
        weights: Sequence[Tensor],
        inlets: Sequence[Tensor],
        gradients: Sequence[Tensor] | None = None,
    ) -> Flow:
        """Adds to the gradients of ``weights``, and returns those at ``inlets`` in a list.

        The list is their only holder, and is empty where there are no such gradients.
        """


class Accumulate:
    """Adds to ``.grad``, with all hooks, exactly as ``loss.backward()`` would."""

    def push(
        self,
        roots: Sequence[Tensor],
        weights: Sequence[Tensor],
        inlets: Sequence[Tensor],
        gradients: Sequence[Tensor] | None = None,
    ) -> Flow:
        if inputs := [*weights, *inlets]:
            backward(roots, gradients, inputs)
        at_inlets = flow([inlet.grad for inlet in inlets])
        for inlet in inlets:
            inlet.grad = None
        return at_inlets


class Reduce(Accumulate):
    """Adds to ``.grad``, and hands on what is final to be averaged over several processes."""

    def __init__(self, reduction: Reduction) -> None:
        self._reduction = reduction

    @override
    def push(
        self,
        roots: Sequence[Tensor],
        weights: Sequence[Tensor],
        inlets: Sequence[Tensor],
        gradients: Sequence[Tensor] | None = None,
    ) -> Flow:
        at_inlets = super().push(roots, weights, inlets, gradients)
        self._reduction.final(weights)
        return at_inlets


class Collect:
    """Puts gradients aside: no ``.grad`` changes and no hook of a weight fires before :meth:`deliver`'s backward."""

    def __init__(self) -> None:
        self._gradients: dict[Tensor, Tensor] = {}

    def push(
        self,
        roots: Sequence[Tensor],
        weights: Sequence[Tensor],
        inlets: Sequence[Tensor],
        gradients: Sequence[Tensor] | None = None,
    ) -> Flow:
        if not (inputs := [*weights, *inlets]):
            return []
        off = _hooks_off(weights)
        with off, off:
            found = list(grad(roots, gradients, inputs))
        at_inlets = flow(found[len(weights) :])
        for weight, gradient in zip(weights, found, strict=False):
            if gradient is not None:
                known = self._gradients.get(weight)
                self._gradients[weight] = gradient if known is None else known + gradient
        return at_inlets

    def deliver(self, total: Tensor, scale: float | Tensor, weights: Iterable[Tensor]) -> Tensor:
        """``total`` as a tensor whose backward hands over the gradients, times the incoming gradient over ``scale``.

        Among several processes, ``weights`` that got no gradient are inputs of it all the same, since
        DistributedDataParallel waits for every one of its parameters. Those with hooks get zeros, since a hook is never
        called without a gradient.
        """
        gradients: list[Tensor | None] = list(self._gradients.values())
        reached = list(self._gradients)
        if in_use() or not reached:
            others = [weight for weight in weights if weight not in self._gradients]
            gradients += [torch.zeros_like(weight) if weight._backward_hooks else None for weight in others]
            reached += others
        self._gradients = {}
        delivered: Tensor = _Deliver.apply(total, scale, gradients, *reached)
        return delivered


class _Deliver(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, total: Tensor, scale: float | Tensor, gradients: list[Tensor | None], *weights: Tensor
    ) -> Tensor:
        ctx.scale = scale
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True asks for a graph of the gradients, and a local pass has none: they were computed in the "
                "forward, unit by unit, and their graphs freed. Leave it out; a loss of gradients belongs into a unit's own loss"
            )
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "backward ran a second time through the same local pass; its gradients were handed over and freed by the "
                "first. Call model(*views) again"
            )
        factor = incoming / ctx.scale
        handed: list[Tensor | None] = []
        for gradient in _emptied(gradients):  # not in place: two weights may have one and the same gradient tensor
            handed.append(None if gradient is None else gradient * factor.to(gradient.device))
        return None, None, None, *handed


def _emptied(items: list[Tensor | None]) -> Iterator[Tensor | None]:
    """Yields ``items`` in order and lets go of each one before the next."""
    items.reverse()
    while items:
        yield items.pop()


def _hooks_off(weights: Sequence[Tensor]) -> Reverted[None]:
    """Keeps ``weight.register_hook`` hooks from running now: they run when the gradient is delivered."""
    hooked = [(weight, weight._backward_hooks) for weight in weights if weight._backward_hooks]

    def off() -> None:
        for weight, _ in hooked:
            weight._backward_hooks = None

    def on() -> None:
        for weight, hooks in hooked:
            weight._backward_hooks = hooks

    return Reverted(off, on)
