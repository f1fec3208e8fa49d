"""A local pass over one rank's stages: gradients of units that reach further go down, those of units above come in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from locallearn._walk.draws import Draw
from locallearn._walk.gradients import Accumulator
from locallearn._walk.isolation import Isolation
from locallearn._walk.segment import Segment, cut, leaves, unchanged
from locallearn.pipeline.share import Share
from locallearn.plan import Unit


class Neighbours(Protocol):
    """Where outlets and gradients go, and where they come from."""

    def send_outlet(self, outlet: Tensor) -> None:
        """Up."""

    def send_gradient(self, unit: int, gradient: Tensor) -> None:
        """Down."""

    def receive_gradient(self, unit: int) -> Tensor:
        """From above."""


class RankPass:
    """One step of a rank.

    The order: a stage runs; the top one's outlet leaves at once; the units that end there are trained, the one that reaches
    below first, whose gradient leaves before the weights here get theirs, if somebody waits for it. In the end come the gradients
    from above.

    Args:
        share: what the rank owns.
        units: all the plan's.
        evaluate: the loss of a unit, a scalar, from the outlet of its last stage.
        accumulator: where gradients go.
        neighbours: the ranks below and above.
        isolation: notes who uses which weight.
        draw: begins the random numbers of a stage or a unit.
        eager: whether nobody waits for the gradients that go down.
        keep: around the forward of the highest stage, if its gradient is to come later.
    """

    def __init__(
        self,
        share: Share,
        units: tuple[Unit, ...],
        evaluate: Callable[[int, Tensor], Tensor],
        accumulator: Accumulator,
        neighbours: Neighbours,
        isolation: Isolation,
        draw: Draw,
        *,
        eager: bool,
        keep: AbstractContextManager[None] | None = None,
    ) -> None:
        self._share, self._units, self._evaluate = share, units, evaluate
        self._accumulator, self._neighbours, self._isolation = accumulator, neighbours, isolation
        self._draw, self._eager, self._keep = draw, eager, keep
        reaching = [units[k] for k in (*share.units, *share.from_above)]
        self._crossed = {s for s in share.stages for unit in reaching if unit.lowest <= s < unit.last}
        self._inlet: Tensor | None = None
        self._segments: dict[int, Segment] = {}
        self._pending: dict[int, list[Tensor]] = {}
        self.losses: list[Tensor] = []

    def begin(self, x: Tensor) -> Tensor:
        """What the lowest stage reads."""
        self._starts(self._share.lowest)
        if not self._share.to_below:
            return x
        self._inlet, x = cut(x.requires_grad_(), differentiable=True)
        return x

    def on_outlet(self, stage: int, outlet: Tensor) -> Tensor:
        """A stage has ended."""
        if stage == self._share.highest:
            self.close()
        self._segments[stage] = Segment(outlet, self._inlet)
        self._isolation.claim_stage(stage, self._segments[stage].weights)
        if stage == self._share.highest:
            self._neighbours.send_outlet(outlet)
        for k in self._share.units:
            if self._units[k].last == stage:
                self._train(k)
        self._inlet, handed_on = cut(outlet, differentiable=stage in self._crossed)
        if stage not in self._share.last_uses:
            self._segments.pop(stage, None)
        if self._inlet is not None:
            self._isolation.opens(stage + 1, self._inlet)
        self._starts(stage + 1)
        return handed_on

    def _starts(self, stage: int) -> None:
        self._draw("stage", stage)
        if stage == self._share.highest and self._keep is not None:
            self._keep.__enter__()

    def close(self) -> None:
        """Ends what the highest stage was run in, if something fails before its end."""
        if self._keep is not None:
            self._keep.__exit__(None, None, None)

    def held(self) -> tuple[Segment, list[Tensor]]:
        """The highest stage's segment and what waits at its outlet, for a gradient that comes in a later step."""
        highest = self._share.highest
        return self._segments.pop(highest), self._pending.pop(highest, [])

    def finish(self) -> None:
        """Takes the gradients that come from above."""
        for k in self._share.from_above:
            gradient = [self._neighbours.receive_gradient(k)]
            with autocast_off(gradient[0].device.type):
                self._walk(k, gradient)

    def _train(self, k: int) -> None:
        unit = self._units[k]
        segment = self._segments[unit.last]
        with unchanged(segment.outlet, f"the decoder or the loss of unit {k}"):
            leaf, features = cut(segment.outlet, differentiable=True)
            self._draw("unit", k)
            loss = self._evaluate(k, features)
        torch.clear_autocast_cache()
        self.losses.append(loss.detach())
        weights = [weight for weight in leaves(loss) if weight is not leaf]
        self._isolation.claim_unit(weights)
        with autocast_off(loss.device.type):
            flow = self._accumulator.push(loss, weights, leaf) if loss.requires_grad else []
            self._walk(k, flow)

    def _walk(self, k: int, flow: list[Tensor]) -> None:
        """Takes a unit's gradient down through this rank's stages, and hands it on to the rank below."""
        unit, share = self._units[k], self._share
        for stage in range(min(unit.last, share.highest), max(unit.lowest, share.lowest) - 1, -1):
            segment, last, below = self._segments[stage], share.last_uses[stage] == k, stage > unit.lowest
            leaving = below and stage == share.lowest
            pending = self._pending.pop(stage, [])
            if last and not pending and stage in unit.updates and (self._eager or not leaving):
                flow = self._push(segment, flow, below=below)  # both in one backward
            else:
                if flow and stage in unit.updates:
                    pending = [pending[0] + flow[0]] if pending else [flow[0]]
                if below:
                    flow = self._pull(segment, flow, retain=bool(pending) or not last)
                if leaving:
                    self._neighbours.send_gradient(k, flow.pop())
                    leaving = False
                if last:
                    self._push(segment, pending, below=False)
                elif pending:
                    self._pending[stage] = pending
            if leaving:
                assert segment.inlet is not None
                self._neighbours.send_gradient(k, flow.pop() if flow else torch.zeros_like(segment.inlet))
            if last:
                del self._segments[stage]

    def _pull(self, segment: Segment, flow: list[Tensor], *, retain: bool) -> list[Tensor]:
        if segment.inlet is None:
            return []
        flow = segment.pull(flow, retain=retain) if flow else []
        return flow or [torch.zeros_like(segment.inlet)]

    def _push(self, segment: Segment, box: list[Tensor], *, below: bool) -> list[Tensor]:
        if not box:
            return []
        root = segment.seed(box)
        del segment.outlet
        return self._accumulator.push(root, segment.weights, segment.inlet if below else None)


def autocast_off(device: str) -> Any:
    """A backward is not under autocast."""
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return nullcontext()
    return torch.autocast(device, enabled=False)
