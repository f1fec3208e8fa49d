"""The default order: a unit is trained as soon as its top stage has run, so that its graphs can be freed."""

from __future__ import annotations

from locallearn.plan import Plan
from locallearn.schedules.actions import Action, Forward, Train


def sequential(plan: Plan) -> list[Action]:
    """Trains every unit as soon as its top stage has run: least memory.

    Example:
        >>> print(*sequential(Plan.windows(4, overlap=1)))
        F0 F1 T0 F2 T1 F3 T2
    """
    actions: list[Action] = []
    for stage in range(plan.stages):
        actions.append(Forward(stage))
        actions += [Train(k) for k, unit in enumerate(plan.units) if unit.last == stage]
    return actions
