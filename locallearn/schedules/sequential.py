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
    due: list[list[Action]] = [[Forward(stage)] for stage in range(plan.stages)]
    for k, unit in enumerate(plan.units):
        due[unit.last].append(Train(k))
    return [action for stage in due for action in stage]
