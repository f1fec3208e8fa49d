"""What is trained: which stages each local loss reaches, and which of them it updates. Plain integers, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any


def whole(name: str, value: Any, least: int | None = 0) -> int:
    """``value`` as an ``int``, where it is a whole number from ``least`` up; ``None`` for any.

    Raises:
        TypeError: if it is no whole number.
        ValueError: if it is less.
    """
    try:
        number = index(value)
    except TypeError:
        at_least = "" if least is None else f", at least {least}"
        raise TypeError(f"{name} is a whole number{at_least}; got {value!r}") from None
    if least is not None and number < least:
        raise ValueError(f"{name} is a whole number, at least {least}; got {number}")
    return number


@dataclass(frozen=True)
class Unit:
    """A run of neighbouring stages under one local loss, which sits at the :term:`outlet` of stage ``last``.

    The loss's gradient walks down from ``last`` to ``first`` and stops. On its way it updates the stages in
    ``updates`` and merely passes through the others.

    Args:
        first: index of the lowest stage that the loss reaches.
        last: index of the highest one (inclusive): the loss reads its outlet.
        updates: indices of the stages that the loss updates; all it reaches by default.

    Example:
        >>> Unit(1, 2)
        Unit(first=1, last=2, updates=(1, 2))
    """

    first: int
    last: int
    updates: tuple[int, ...]

    def __init__(self, first: int, last: int, updates: Iterable[int] | None = None) -> None:
        first, last = index(first), index(last)
        if not 0 <= first <= last:
            raise ValueError(f"a unit runs from first to last with 0 <= first <= last; got first={first}, last={last}")
        updated = range(first, last + 1) if updates is None else sorted({index(stage) for stage in updates})
        if not updated or updated[0] < first or updated[-1] > last:
            raise ValueError(
                f"a unit updates at least one of the stages it reaches, {first} to {last}; got updates={list(updated)}"
            )
        object.__setattr__(self, "first", first)
        object.__setattr__(self, "last", last)
        object.__setattr__(self, "updates", tuple(updated))

    @property
    def lowest(self) -> int:
        """The lowest stage that the loss updates, where its walk ends."""
        return self.updates[0]


@dataclass(frozen=True)
class Plan:
    """Which stages each local loss reaches and updates.

    ``print(plan)`` draws it: ``#`` for a stage that a unit reaches and updates, ``.`` for one that it only reaches.

    Args:
        stages: how many stages the backbone is cut into.
        units: the units from bottom to top, in the order of their ``last`` stages.

    Example:
        >>> print(Plan.windows(4, overlap=1))
                stage 0  1  2  3
        unit 0        #  #
        unit 1           #  #
        unit 2              #  #
    """

    stages: int
    units: tuple[Unit, ...]

    def __init__(self, stages: int, units: Sequence[Unit]) -> None:
        stages, units = index(stages), tuple(units)
        if stages < 1:
            raise ValueError(f"a plan needs at least one stage; got stages={stages}")
        if not units:
            raise ValueError("a plan needs at least one unit; got none")
        if beyond := [unit for unit in units if unit.last >= stages]:
            raise ValueError(f"units reach beyond the last stage, {stages - 1}: {beyond}")
        lasts = [unit.last for unit in units]
        if lasts != sorted(lasts):
            raise ValueError(f"units are listed from bottom to top; got units whose last stages are {lasts}")
        object.__setattr__(self, "stages", stages)
        object.__setattr__(self, "units", units)

    def spanning(self) -> list[list[Unit]]:
        """For each stage, the units whose gradient has to pass the cut above it.

        Example:
            >>> [len(units) for units in Plan.windows(4, overlap=1).spanning()]
            [1, 1, 1, 0]
        """
        spanning: list[list[Unit]] = [[] for _ in range(self.stages)]
        for unit in self.units:
            for cut in range(unit.lowest, unit.last):
                spanning[cut].append(unit)
        return spanning

    @classmethod
    def windows(cls, stages: int, overlap: int = 1, *, lead_in: bool = False) -> Plan:
        """Units of ``overlap + 1`` neighbouring stages, each moved up by one (Figure 1 of the LoCo paper).

        ``overlap=0`` is Greedy InfoMax, ``overlap=1`` LoCo, ``overlap=stages - 1`` end-to-end training.

        Args:
            stages: how many stages the backbone is cut into.
            overlap: how many stages neighbouring units share, from 0 to ``stages - 1``.
            lead_in: also train the truncated units at the bottom, which end at the stages 0 to ``overlap - 1``
                (Appendix A of the paper speaks of a loss on the first stage alone; its Figure 1 has none).

        Raises:
            ValueError: if ``overlap`` is out of range.

        Example:
            >>> print(Plan.windows(3, overlap=1, lead_in=True))
                    stage 0  1  2
            unit 0        #
            unit 1        #  #
            unit 2           #  #
        """
        stages, overlap = whole("stages", stages, None), whole("overlap", overlap, None)
        if stages < 1:
            raise ValueError(f"a plan needs at least one stage; got stages={stages}")
        if overlap < 0:
            raise ValueError(f"overlap is at least 0 (Greedy InfoMax); got {overlap}")
        if overlap >= stages:
            raise ValueError(
                f"overlap={overlap} needs at least {overlap + 1} stages; there {'are' if stages > 1 else 'is'} {stages}. "
                f"Cut the backbone into more stages, or take an overlap of at most {stages - 1} (0 is Greedy InfoMax)"
            )
        tops = range(0 if lead_in else overlap, stages)
        return cls(stages, [Unit(max(0, top - overlap), top) for top in tops])

    @classmethod
    def union(cls, *plans: Plan) -> Plan:
        """The units of several plans for the same stages, from bottom to top; one that is in two of them counts once.

        Units that end at the same stage keep a decoder each.

        Args:
            plans: at least one, all of as many stages.

        Raises:
            ValueError: if there is none, or if they are for different numbers of stages.

        Example:
            >>> print(Plan.union(Plan.windows(3, overlap=0), Plan.windows(3, overlap=1)))
                    stage 0  1  2
            unit 0        #
            unit 1        #  #
            unit 2           #
            unit 3           #  #
            unit 4              #
        """
        counts = [plan.stages for plan in plans]
        if len(set(counts)) != 1:
            raise ValueError(f"a union is of plans for the same number of stages; got plans for {counts} stages")
        units = dict.fromkeys(unit for plan in plans for unit in plan.units)
        return cls(counts[0], sorted(units, key=lambda unit: (unit.last, unit.first)))

    @classmethod
    def greedy(cls, stages: int) -> Plan:
        """Each loss trains its own stage alone: Greedy InfoMax (Löwe et al. 2019), greedy supervised learning, DGL.

        This is ``Plan.windows(stages, overlap=0)``.

        Example:
            >>> print(Plan.greedy(3))
                    stage 0  1  2
            unit 0        #
            unit 1           #
            unit 2              #
        """
        return cls.windows(stages, overlap=0)

    @classmethod
    def end_to_end(cls, stages: int) -> Plan:
        """One loss at the top trains everything: backpropagation. This is ``Plan.windows(stages, overlap=stages - 1)``.

        Example:
            >>> print(Plan.end_to_end(3))
                    stage 0  1  2
            unit 0        #  #  #
        """
        return cls.windows(stages, overlap=index(stages) - 1)

    @classmethod
    def deep_supervision(cls, stages: int) -> Plan:
        """A loss at every stage, each of which trains all the stages below it (Lee et al. 2015): nothing is isolated.

        This is ``Plan.windows(stages, overlap=stages - 1, lead_in=True)``. It saves no memory.

        Example:
            >>> print(Plan.deep_supervision(3))
                    stage 0  1  2
            unit 0        #
            unit 1        #  #
            unit 2        #  #  #
        """
        return cls.windows(stages, overlap=index(stages) - 1, lead_in=True)

    @classmethod
    def hierarchical(cls, stages: int) -> Plan:
        """HPFF's independent and cascaded modules together (Su et al. 2024): overlaps 0 and 1.

        This is ``Plan.union(Plan.greedy(stages), Plan.windows(stages, overlap=1))``; :meth:`union` draws it.

        Example:
            >>> [(unit.first, unit.last) for unit in Plan.hierarchical(3).units]
            [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2)]
        """
        return cls.union(cls.greedy(stages), cls.windows(stages, overlap=1))

    @classmethod
    def first_blocks(cls, stages: int) -> Plan:
        """Each loss reaches its own stage and the first blocks of the next one (Table 5, "sharing n blocks").

        The backbone is cut more finely: after each stage, and inside each but the first one after its first n
        blocks. For two shared blocks of a ResNet, ``stages=["layer1", "layer2.1", "layer2", "layer3.1", "layer3",
        "layer4.1", "layer4"]`` and ``plan=Plan.first_blocks(4)``.

        Args:
            stages: how many stages there are before the finer cut; the plan has ``2 * stages - 1``.

        Example:
            >>> print(Plan.first_blocks(3))
                    stage 0  1  2  3  4
            unit 0        #  #
            unit 1           #  #  #
            unit 2                 #  #
        """
        top = 2 * index(stages) - 2
        return cls(top + 1, [Unit(max(0, last - 2), last) for last in range(1, top, 2)] + [Unit(max(0, top - 1), top)])

    def __str__(self) -> str:
        width = max(2, len(str(self.stages - 1))) + 1
        label = len(f"unit {len(self.units) - 1}")
        lines = [" " * (label + 2) + "stage" + "".join(f"{s:>{2 if s == 0 else width}}" for s in range(self.stages))]
        for k, unit in enumerate(self.units):
            marks = [
                "#" if s in unit.updates else "." if unit.first <= s <= unit.last else "" for s in range(self.stages)
            ]
            row = "".join(f"{mark:>{2 if s == 0 else width}}" for s, mark in enumerate(marks))
            lines.append((f"unit {k}".ljust(label + 7) + row).rstrip())
        return "\n".join(lines)
