"""What a plan on given cuts will take, put together from what its pieces take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from locallearn.memory.pieces import Piece
from locallearn.plan import Plan
from locallearn.schedules.actions import Action, Forward, last_uses


class Phase(NamedTuple):
    """A forward of a stage, or the training of a unit: the most bytes that are alive in it, and what it computes."""

    action: Action
    peak: float


class _Stage(NamedTuple):
    pieces: Sequence[Piece]
    kept: int
    outlet: int


def predict(plan: Plan, actions: Sequence[Action], stages: Sequence[Sequence[Piece]], base: int = 0) -> list[Phase]:
    """The phases of a local step, in order.

    Args:
        plan: what is trained.
        actions: in what order.
        stages: the pieces of each stage.
        base: what is alive all the time.
    """
    last_use = last_uses(plan, actions)
    whole = [_Stage(pieces, sum(piece.kept for piece in pieces), pieces[-1].outlet) for pieces in stages]
    live: set[int] = set()
    pending: set[int] = set()
    phases: list[Phase] = []
    ran = -1

    def alive(graphs: set[int]) -> int:
        """Some stages' graphs, the outlets that they or the next forward begin with, and the gradients that wait."""
        outlets = ({s - 1 for s in graphs if s > 0} | {ran}) - graphs - {-1}
        kept = sum(whole[s].kept for s in graphs)
        return base + kept + sum(whole[s].outlet for s in outlets) + sum(whole[s].outlet for s in pending)

    for action in actions:
        if isinstance(action, Forward):
            now, peak = float(alive(live)), 0.0
            for piece in whole[action.stage].pieces:
                peak = max(peak, now + piece.forward)
                now += piece.kept if action.stage in last_use else 0
            if action.stage in last_use:
                live.add(action.stage)
            ran = action.stage
            phases.append(Phase(action, peak))
            continue
        unit = plan.units[action.unit]
        peak = alive(live) + whole[unit.last].pieces[-1].train
        for s in range(unit.last, unit.lowest - 1, -1):
            last, waits = last_use[s] == action.unit, s in pending
            if s > unit.lowest and (waits or not last):  # the gradient goes through, and the graph stays
                rest = alive(live) + (0 if waits else whole[s].outlet)
                peak = max(peak, rest + max(piece.pull - piece.kept for piece in whole[s].pieces))
            if last:
                pending.discard(s)
                live.discard(s)
                rest = alive(live) + (whole[s - 1].outlet if s > 0 and s - 1 not in live else 0)
                held = s == ran or s + 1 in live  # the stage above begins with its outlet
                peak = max(peak, rest + _freed_from_the_top(whole[s], held))
            elif s in unit.updates:
                pending.add(s)
        phases.append(Phase(action, peak + whole[ran].pieces[-1].held))  # the forward waits
    return phases


def _freed_from_the_top(stage: _Stage, held: bool) -> int:
    """The most that a stage takes during its last backward, piece by piece; ``held``: its outlet counts elsewhere."""
    below, most = stage.kept, 0
    for piece in reversed(stage.pieces):
        below -= piece.kept
        most = max(most, below + piece.push - (stage.outlet if held and piece is stage.pieces[-1] else 0))
    return most


def size(count: float) -> str:
    """A number of bytes in the unit that fits: ``"17 B"``, ``"4.1 kB"``, ``"820 MB"``, ``"1.2 TB"``."""
    unit, rest = "B", float(count)
    for larger in ("kB", "MB", "GB", "TB"):
        if rest < 999.5:  # what rounds to 1000 goes on
            break
        unit, rest = larger, rest / 1000
    return f"{rest:,.0f} {unit}" if unit == "B" or rest >= 100 else f"{rest:.3g} {unit}"
