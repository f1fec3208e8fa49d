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
from locallearn._walk.segment import Flow, Segment, added, cut, leaves, overlapping, unchanged
from locallearn.pipeline.share import Share
from locallearn.plan import Unit


class Neighbours(Protocol):
    """Where outlets and gradients go, and where they come from."""

    def send_outlet(self, outlet: Any) -> None:
        """Up."""

    def send_gradient(self, unit: int, gradients: Flow) -> None:
        """Down."""

    def receive_gradient(self, unit: int) -> Flow:
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
        device: the kind of it, for autocast.
        eager: whether nobody waits for the gradients that go down.
        keep: around the forward of the highest stage, if its gradient is to come later.
    """

    def __init__(
        self,
        share: Share,
        units: tuple[Unit, ...],
        evaluate: Callable[[int, Any], Tensor],
        accumulator: Accumulator,
        neighbours: Neighbours,
        isolation: Isolation,
        draw: Draw,
        device: str,
        *,
        eager: bool,
        keep: AbstractContextManager[None] | None = None,
    ) -> None:
        self._share, self._units, self._evaluate = share, units, evaluate
        self._accumulator, self._neighbours, self._isolation = accumulator, neighbours, isolation
        self._draw, self._device, self._eager, self._keep = draw, device, eager, keep
        reaching = [units[k] for k in (*share.units, *share.from_above)]
        self._crossed = {s for s in share.stages for unit in reaching if unit.lowest <= s < unit.last}
        self._inlets: list[Tensor] = []
        self._segments: dict[int, Segment] = {}
        self._pending: dict[int, Flow] = {}
        self.losses: list[Tensor] = []

    def begin(self, x: Any) -> Any:
        """What the lowest stage reads."""
        self._starts(self._share.lowest)
        self._inlets, x = cut(x, differentiable=bool(self._share.to_below))
        return x

    def on_outlet(self, stage: int, outlet: Any) -> Any:
        """A stage has ended."""
        if stage == self._share.highest:
            self.close()
        if not isinstance(outlet, Tensor) and overlapping(outlet):
            raise ValueError(
                f"stage {stage} returns tensors that share memory; on several ranks they would not. Return copies"
            )
        self._segments[stage] = segment = Segment(outlet, self._inlets)
        self._isolation.claim_stage(stage, segment.weights, segment.outlets)
        if stage == self._share.highest:
            self._neighbours.send_outlet(outlet)
        for k in self._share.units:
            if self._units[k].last == stage:
                self._train(k)
        self._inlets, handed_on = cut(outlet, differentiable=stage in self._crossed)
        if stage not in self._share.last_uses:
            self._segments.pop(stage, None)
        self._isolation.opens(stage + 1, self._inlets)
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

    def held(self) -> tuple[Segment, Flow]:
        """The highest stage's segment and what waits at its outlet, for a gradient that comes in a later step."""
        highest = self._share.highest
        return self._segments.pop(highest), self._pending.pop(highest, [])

    def finish(self) -> None:
        """Takes the gradients that come from above."""
        for k in self._share.from_above:
            with autocast_off(self._device):
                self._walk(k, self._neighbours.receive_gradient(k))

    def _train(self, k: int) -> None:
        unit = self._units[k]
        segment = self._segments[unit.last]
        inlets, outlet = cut(segment.outlet, differentiable=True)
        self._draw("unit", k)
        with unchanged(segment.outlet, f"the decoder or the loss of unit {k}"):
            loss = self._evaluate(k, outlet)
        torch.clear_autocast_cache()
        self.losses.append(loss.detach())
        weights = leaves(loss, beyond=inlets)
        self._isolation.claim_unit(weights)
        with autocast_off(loss.device.type):
            flow = self._accumulator.push([loss], weights, inlets) if loss.requires_grad else []
            self._walk(k, flow)

    def _walk(self, k: int, flow: Flow) -> None:
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
                    pending = added(pending, flow)
                if below:
                    flow = self._pull(segment, flow, retain=bool(pending) or not last)
                if leaving:
                    self._neighbours.send_gradient(k, flow)
                    leaving, flow = False, []
                if last:
                    self._push(segment, pending, below=False)
                elif pending:
                    self._pending[stage] = pending
            if leaving:
                self._neighbours.send_gradient(k, flow)
            if last:
                del self._segments[stage]

    def _pull(self, segment: Segment, flow: Flow, *, retain: bool) -> Flow:
        return segment.pull(flow, retain=retain) if flow and segment.inlets else []

    def _push(self, segment: Segment, box: Flow, *, below: bool) -> Flow:
        if not box:
            return []
        roots, gradients = segment.start(box)
        segment.let_go()
        return self._accumulator.push(roots, segment.weights, segment.inlets if below else (), gradients)


def autocast_off(device: str) -> Any:
    """A backward is not under autocast."""
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return nullcontext()
    return torch.autocast(device, enabled=False)
