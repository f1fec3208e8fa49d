"""Carries out a schedule while the backbone's own forward runs: the only place where tensors meet the plan."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from locallearn._walk.cuts import check_order, checked, hooked
from locallearn._walk.draws import draws
from locallearn._walk.gradients import Accumulator
from locallearn._walk.hooks import has_backward_hooks
from locallearn._walk.isolation import Isolation
from locallearn._walk.recompute import Run, in_checkpoint, possible, recomputed
from locallearn._walk.replay import Learnt
from locallearn._walk.segment import Flow, Segment, added, changes_outlet, cut, leaves, overlapping, version
from locallearn._walk.trees import called
from locallearn.plan import Unit
from locallearn.schedules.actions import Execution, Train


class LocalPass:
    """One forward of a backbone during which every unit is evaluated and, given an accumulator, trained.

    Args:
        backbone: runs its own ``forward``.
        cuts: the names of the submodules after which the stages end.
        ends: those submodules.
        execution: what each unit's loss reaches and updates, and in what order.
        evaluate: the loss of a unit, a scalar, from the outlet of its last stage.
        accumulator: where gradients go; ``None`` only evaluates.
        scale: a factor on every loss before its backward.
        runs: the submodules that are recomputed instead of kept, and what is known of them, see
            :mod:`locallearn._walk.recompute`.
        seed: of the random numbers of stages and units, see :mod:`locallearn._walk.draws`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        cuts: tuple[str, ...],
        ends: Sequence[nn.Module],
        execution: Execution,
        evaluate: Callable[[int, Any], Tensor],
        accumulator: Accumulator | None,
        scale: float | Tensor | None = None,
        runs: Mapping[Run, Learnt] = MappingProxyType({}),
        seed: int | None = None,
    ) -> None:
        self._backbone, self._cuts, self._ends, self._units = backbone, cuts, ends, execution.plan.units
        self._actions = deque(execution.actions)
        self._last_uses, self._spanning = execution.last_uses, execution.spanning
        self._evaluate, self._accumulator, self._scale = evaluate, accumulator, scale
        self._runs, self._draws = possible(backbone, runs), draws(seed, backbone)
        self._watched = accumulator is not None and has_backward_hooks(*backbone.modules())
        self._highest = max(self._last_uses)  # what lies above needs no graph
        self._isolation = Isolation(backbone, cuts)
        self._ran: list[int] = []
        self._in_order = True
        self._inlets: list[Tensor] = []
        self._overlapping: list[
            tuple[Tensor, int]
        ] = []  # tensors of the last outlet that share memory, and their versions
        self._segments: dict[int, Segment] = {}
        self._pending: dict[int, Flow] = {}  # gradients at outlets for which weights still wait
        self._losses: dict[int, Tensor] = {}

    def run(self, batch: Any) -> list[Tensor]:
        """Runs the backbone on ``batch`` and returns the units' losses, detached scalars."""
        cuts = hooked(self._ends, self._outlet)
        try:
            with (
                torch.set_grad_enabled(self._accumulator is not None),
                self._draws as self._draw,
                cuts,
                cuts as concerned,  # twice, see Reverted
            ):
                parts = recomputed(self._backbone, self._runs, concerned)
                with parts, parts:
                    self._draw("stage", 0)
                    called(self._backbone, batch)
        except CheckpointError as error:
            raise RuntimeError(
                "what runs again in the backward did something else than in the forward: other operations, or on other shapes. "
                "It depends on what outlives a forward: random numbers that are not torch's (layer drop), a flag or a counter, "
                "a cache such as parametrize.cached(), a mode that was changed. Take the module out of checkpoint=, or your own "
                f"torch.utils.checkpoint away. {_first_line(error)}"
            ) from error
        except RuntimeError as error:
            if "donated buffer" not in str(error):
                raise
            raise RuntimeError(
                "a stage that several units share is differentiated more than once, but a part of it went through torch.compile, "
                "which overwrites what it has saved in its first backward. Set torch._functorch.config.donated_buffer = False "
                "before anything is compiled"
            ) from error
        if not self._in_order or len(self._ran) != len(self._cuts):
            check_order(self._cuts, self._ran, self._backbone)
        return [self._losses[k] for k in range(len(self._units))]

    def _outlet(self, stage: int, output: object) -> object:
        """A stage has ended: keeps its segment, trains the units that are due, and begins the next stage."""
        self._in_order = self._in_order and stage == len(self._ran)
        self._ran.append(stage)
        if not self._in_order:
            return output  # the forward runs to its end, so that check_order can tell the whole story
        outlet = checked(stage, self._cuts[stage], output)
        if self._overlapping:
            self._check_overlapping(stage)
        if self._accumulator is not None and in_checkpoint(LocalPass.run.__code__):
            raise RuntimeError(
                f"stage {stage} ends after {self._cuts[stage]!r}, inside of a function that the backbone checkpoints itself: it "
                "would run again across the cut. Checkpoint parts of a stage, so that none of the cuts lies inside of one: "
                f"{list(self._cuts)}"
            )
        if stage in self._last_uses:
            self._segments[stage] = Segment(outlet, self._inlets)
            self._isolation.claim_stage(stage, self._segments[stage].weights, self._segments[stage].outlets)
        self._actions.popleft()
        trains = self._accumulator is not None
        if torch.is_grad_enabled() == trains and not torch.is_inference_mode_enabled():
            handed_on = self._due(stage, outlet)
        else:  # whatever the backbone has set around the end of the stage
            outside = torch.inference_mode(False) if trains and torch.is_inference_mode_enabled() else nullcontext()
            with outside, torch.set_grad_enabled(trains):
                handed_on = self._due(stage, outlet)
        if self._inlets:
            self._isolation.opens(stage + 1, self._inlets)
        if stage == self._highest:
            torch.set_grad_enabled(False)
        elif not isinstance(outlet, Tensor):
            self._overlapping = overlapping(outlet)
        self._draw("stage", stage + 1)
        return handed_on

    def _due(self, stage: int, outlet: Any) -> Any:
        """Trains the units that are due when ``stage`` has ended, and cuts its outlet; returns what to go on with."""
        while self._actions and isinstance(action := self._actions[0], Train):
            self._actions.popleft()
            self._train(action.unit)
        crossed = any(self._walks_below(unit, stage + 1) for unit in self._spanning[stage])
        # hooks on the backward of a stage's first module see a gradient of its input, whether it is walked on or not
        asked = crossed or (self._watched and stage + 1 in self._last_uses)
        self._inlets, handed_on = cut(outlet, differentiable=asked)
        return handed_on

    def _check_overlapping(self, stage: int) -> None:
        if any(version(tensor) != known for tensor, known in self._overlapping):
            raise RuntimeError(
                f"stage {stage} ({self._cuts[stage]!r}) changes in place what stage {stage - 1} ({self._cuts[stage - 1]!r}) "
                "returned, tensors that share memory: past the cut, the graph of one cannot follow a change of the other. Return "
                "copies (`.clone()`), or take operations that are not in place"
            )
        self._overlapping = []

    def _walks_below(self, unit: Unit, stage: int) -> bool:
        """Whether there is something to train for ``unit`` below ``stage``."""
        for below in unit.updates:
            if below >= stage:
                return False
            if self._segments[below].weights:
                return True
        return False

    def _train(self, k: int) -> None:
        """Evaluates a unit's loss, as the user's autocast says, and walks its gradient down, outside of autocast."""
        unit = self._units[k]
        segment = self._segments[unit.last]
        if segment.changed():
            raise RuntimeError(
                f"the outlet of stage {unit.last} ({self._cuts[unit.last]!r}) was changed in place before unit {k} read it: "
                "the next stage begins with an in-place operation. Build it with inplace=False, or train the unit as soon "
                "as the stage has run (schedule=sequential)"
            )
        asked = self._walks_below(unit, unit.last + 1)
        inlets, outlet = cut(segment.outlet, differentiable=asked, onward=False)
        self._draw("unit", k)
        try:
            loss = self._evaluate(k, outlet)
        except RuntimeError as error:
            if inlets and "a leaf Variable that requires grad" in str(error):
                raise changes_outlet(f"the decoder or the loss of unit {k}") from error
            raise
        if segment.changed():
            raise changes_outlet(f"the decoder or the loss of unit {k}")
        torch.clear_autocast_cache()  # which would keep the casts of weights whose graphs are freed below
        self._losses[k] = loss.detach()
        if _autocasts(loss.device.type):
            with torch.autocast(loss.device.type, enabled=False):
                self._walk(k, self._through_decoder(loss, inlets))
        else:
            self._walk(k, self._through_decoder(loss, inlets))

    def _through_decoder(self, loss: Tensor, inlets: list[Tensor]) -> Flow:
        """Trains the decoder, and the loss if it has weights; returns the gradients at the outlet below."""
        if self._accumulator is None or not loss.requires_grad:
            return []
        weights = leaves(loss, beyond=inlets)
        self._isolation.claim_unit(weights)
        return self._accumulator.push([loss if self._scale is None else loss * self._scale], weights, inlets)

    def _walk(self, k: int, flow: Flow) -> None:
        """Takes a unit's gradient from the outlet of its last stage down to its lowest one; ``flow`` is its only holder.

        Backpropagation is linear in the gradient: where several units reach a stage, each one's gradient passes through
        to the inlet by itself, but the weights get theirs once, from the sum of all.
        """
        unit = self._units[k]
        for stage in range(unit.last, unit.lowest - 1, -1):
            segment, last = self._segments[stage], self._last_uses[stage] == k
            below = bool(flow and segment.inlets) and self._walks_below(unit, stage)
            pending = self._pending.pop(stage, [])
            if last and not pending and stage in unit.updates:
                flow = self._push(segment, flow, below=below)
            else:
                if flow and stage in unit.updates:
                    pending = added(pending, flow)
                flow = segment.pull(flow, retain=bool(pending) or not last) if below else []
                if last:
                    self._push(segment, pending, below=False)
                elif pending:
                    self._pending[stage] = pending
            if last:
                del self._segments[stage]

    def _push(self, segment: Segment, box: Flow, *, below: bool) -> Flow:
        """The last backward through a segment, which lets go of its outlet: what is recomputed may not need it."""
        assert self._accumulator is not None or not box
        if self._accumulator is None or not box:
            return []
        roots, gradients = segment.start(box)
        segment.let_go()
        flow = self._accumulator.push(
            roots, segment.weights, segment.inlets if below or self._watched else (), gradients
        )
        return flow if below else []


def _first_line(error: Exception) -> str:
    return f"torch says: {str(error).strip().splitlines()[0]}" if str(error).strip() else ""


@cache
def _knows_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def _autocasts(device: str) -> bool:
    return _knows_autocast(device) and torch.is_autocast_enabled(device)
