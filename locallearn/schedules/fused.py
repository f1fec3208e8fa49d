"""The whole forward first, then every unit, as most published code for local learning does."""

from __future__ import annotations

from locallearn.plan import Plan
from locallearn.schedules.actions import Action, Forward, Train


def fused(plan: Plan) -> list[Action]:
    """Runs the whole forward, then trains every unit: saves no memory, and is here for comparison.

    Example:
        >>> print(*fused(Plan.windows(4, overlap=1)))
        F0 F1 F2 F3 T0 T1 T2
    """
    forwards: list[Action] = [Forward(stage) for stage in range(plan.stages)]
    return forwards + [Train(k) for k in range(len(plan.units))]
