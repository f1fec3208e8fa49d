"""What each rank of a pipeline has to do: plain integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from locallearn.plan import Plan


@dataclass(frozen=True)
class Share:
    """A run of neighbouring stages, and the units whose losses sit there.

    A unit belongs to the rank that owns its last stage. What it reaches further down is walked by the ranks below, one hop
    after the other.

    Attributes:
        rank: whose share this is.
        lowest: the first stage.
        highest: the last one (inclusive).
        units: the units whose losses sit here, from bottom to top.
        from_above: the units whose gradients come down to the outlet of ``highest``, in the order in which they come.
        to_below: the units whose gradients go on to the rank below, in the order in which they go.
        last_uses: for each stage that a unit needs, the unit that needs it last.
    """

    rank: int
    lowest: int
    highest: int
    units: tuple[int, ...]
    from_above: tuple[int, ...]
    to_below: tuple[int, ...]
    last_uses: dict[int, int]

    @property
    def stages(self) -> range:
        """The stages."""
        return range(self.lowest, self.highest + 1)


def shares(plan: Plan, ranks: Sequence[int]) -> list[Share]:
    """The shares of all ranks; ``ranks`` says how many stages each of them owns, from bottom to top.

    Raises:
        ValueError: if the stages are not divided up among the ranks.

    Example:
        >>> [(share.units, share.from_above) for share in shares(Plan.windows(4, overlap=1), [2, 2])]
        [((0,), (1,)), ((1, 2), ())]
    """
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in ranks) or sum(ranks) != plan.stages:
        raise ValueError(
            f"ranks says how many stages each process owns, at least one, {plan.stages} in all, such as ranks="
            f"{_even(plan.stages, min(len(ranks) or 1, plan.stages))}; got {list(ranks)}"
        )
    found = []
    for rank, (end, n) in enumerate(zip(accumulate(ranks), ranks, strict=True)):
        lowest, highest = end - n, end - 1
        units = [(k, unit.lowest, unit.last) for k, unit in enumerate(plan.units)]
        here = [(k, low, last) for k, low, last in units if last >= lowest and low <= highest]
        found.append(
            Share(
                rank,
                lowest,
                highest,
                tuple(k for k, _, last in here if last <= highest),
                tuple(k for k, _, last in here if last > highest),
                tuple(k for k, low, _ in here if low < lowest),
                {s: k for k, low, last in here for s in range(max(low, lowest), min(last, highest) + 1)},
            )
        )
    return found


def _even(stages: int, ranks: int) -> list[int]:
    return [stages // ranks + (rank < stages % ranks) for rank in range(ranks)]
