"""Of the gradients that reach a shared stage, only the uppermost unit's updates it."""

from __future__ import annotations

from typing_extensions import override

from locallearn.plan import Plan, Unit
from locallearn.sharing.base import Sharing


class UpperOnly(Sharing):
    """A shared stage passes every unit's gradient on, but only the upper unit's updates it (Table 5: 65.3).

    Example:
        >>> print(UpperOnly().plan(4, overlap=1))
                stage 0  1  2  3
        unit 0        #  .
        unit 1           #  .
        unit 2              #  #
    """

    @override
    def plan(self, stages: int, overlap: int) -> Plan:
        plan = super().plan(stages, overlap)
        uppermost = {stage: k for k, unit in enumerate(plan.units) for stage in unit.updates}
        return Plan(
            stages,
            [
                Unit(unit.first, unit.last, [stage for stage in unit.updates if uppermost[stage] == k])
                for k, unit in enumerate(plan.units)
            ],
        )
