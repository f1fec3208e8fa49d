"""A stage's gradient that is taken at the weights of its forward, after the optimizer has gone on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from locallearn._walk.gradients import Accumulator
from locallearn._walk.segment import Flow, Segment, added
from locallearn._walk.undo import Reverted


class Late:
    """A segment, with what waits at its outlet, until the rest of its gradient comes.

    Args:
        segment: of the stage; its graph ends at copies of the weights.
        pending: the gradients at its outlet so far.
        copies: for each weight, the copy that its stage was run with.
    """

    def __init__(self, segment: Segment, pending: Flow, copies: dict[nn.Parameter, nn.Parameter]) -> None:
        self._segment, self._pending, self._copies = segment, pending, copies

    def finish(self, gradients: Flow, accumulator: Accumulator) -> None:
        """Adds the gradients of the copies to those of the weights."""
        if box := added(self._pending, gradients):
            roots, at_roots = self._segment.start(box)
            accumulator.push(roots, self._segment.weights, (), at_roots)
        for weight, copy in self._copies.items():
            if copy.grad is not None:
                weight.grad = copy.grad if weight.grad is None else weight.grad + copy.grad


def copied(weights: Sequence[nn.Parameter]) -> dict[nn.Parameter, nn.Parameter]:
    """A copy of each."""
    return {weight: nn.Parameter(weight.detach().clone(), weight.requires_grad) for weight in weights}


def swapped(model: nn.Module, copies: dict[nn.Parameter, nn.Parameter]) -> Reverted[None]:
    """While open, ``model`` has the copies in the places of its weights."""
    places = [(m, name, w) for m in model.modules() for name, w in m._parameters.items() if w in copies]

    def put(choose: Callable[[nn.Parameter], nn.Parameter]) -> None:
        for module, name, weight in places:
            assert weight is not None
            module._parameters[name] = choose(weight)

    return Reverted(lambda: put(copies.__getitem__), lambda: put(lambda weight: weight))
