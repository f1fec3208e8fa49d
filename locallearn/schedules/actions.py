"""What a schedule is made of: Forward(stage) and Train(unit), and what every order of them has to keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from locallearn.plan import Plan


@dataclass(frozen=True)
class Forward:
    """Run a :term:`stage`; what it needs for a backward pass is kept until no unit needs it any more."""

    stage: int

    def __str__(self) -> str:
        return f"F{self.stage}"


@dataclass(frozen=True)
class Train:
    """Evaluate a :term:`unit`'s loss, and :term:`walk` its gradient down the unit's stages."""

    unit: int

    def __str__(self) -> str:
        return f"T{self.unit}"


Action: TypeAlias = Forward | Train
Schedule: TypeAlias = Callable[[Plan], Sequence[Action]]


def check(plan: Plan, actions: Iterable[Action]) -> tuple[Action, ...]:
    """Returns ``actions`` if they carry out ``plan``: every stage once, in order, and every unit once its top has run.

    Raises:
        ValueError: otherwise, with the whole order and what is wrong in it.
    """
    actions = tuple(actions)
    forwards = [action.stage for action in actions if isinstance(action, Forward)]
    trained = [action.unit for action in actions if isinstance(action, Train)]
    wrong = ""
    if forwards != list(range(plan.stages)):
        wrong = f"it runs the stages {forwards} instead of {list(range(plan.stages))}"
    elif sorted(trained) != list(range(len(plan.units))):
        wrong = f"it trains the units {trained}, not each of the {len(plan.units)} once"
    else:
        position = {action: at for at, action in enumerate(actions)}
        early = [k for k, unit in enumerate(plan.units) if position[Train(k)] < position[Forward(unit.last)]]
        if early:
            wrong = f"it trains the units {early} before their last stages have run"
    if wrong:
        raise ValueError(f"the schedule does not carry out the plan: {wrong}. It is: {' '.join(map(str, actions))}")
    return actions


def last_uses(plan: Plan, actions: Sequence[Action]) -> dict[int, int]:
    """For every stage whose graph some unit needs, the unit that needs it last: there its weights get their gradient.

    Example:
        >>> from locallearn.schedules import sequential
        >>> plan = Plan.windows(3, overlap=1)
        >>> last_uses(plan, sequential(plan))
        {0: 0, 1: 1, 2: 1}
    """
    trains = [action.unit for action in actions if isinstance(action, Train)]
    return {stage: k for k in trains for stage in range(plan.units[k].lowest, plan.units[k].last + 1)}


class Execution:
    """A plan and the order in which it is carried out, with what follows from the two: the same in every pass.

    Args:
        plan: what is trained.
        schedule: in what order.

    Attributes:
        actions: the order, checked.
        last_uses: see :func:`last_uses`.
        spanning: see :meth:`locallearn.Plan.spanning`.

    Raises:
        TypeError: if the schedule is no function, or gives no actions.
        ValueError: if the schedule does not carry out the plan.
    """

    def __init__(self, plan: Plan, schedule: Schedule) -> None:
        if not callable(schedule):
            raise TypeError(
                f"schedule is a function of the plan, such as locallearn.sequential or locallearn.fused; got {schedule!r}"
            )
        actions = schedule(plan)
        if not isinstance(actions, Iterable):
            raise TypeError(f"the schedule gives Forward and Train actions in their order; got {actions!r}")
        self.plan, self.schedule = plan, schedule
        self.actions = check(plan, actions)
        self.last_uses = last_uses(plan, self.actions)
        self.spanning = plan.spanning()


def peak(plan: Plan, actions: Sequence[Action]) -> int:
    """How many stages' graphs are alive at once, at most.

    Example:
        >>> from locallearn.schedules import fused, sequential
        >>> plan = Plan.windows(6, overlap=1)
        >>> peak(plan, sequential(plan)), peak(plan, fused(plan))
        (2, 6)
    """
    freed_by = last_uses(plan, actions)
    alive: set[int] = set()
    most = 0
    for action in actions:
        if isinstance(action, Forward):
            alive |= {action.stage} & freed_by.keys()
            most = max(most, len(alive))
        else:
            alive -= {stage for stage, unit in freed_by.items() if unit == action.unit}
    return most
