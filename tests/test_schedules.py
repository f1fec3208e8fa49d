"""Schedules order a plan's actions, print, and are checked without a tensor."""

from __future__ import annotations

import pytest

from locallearn import Plan, Unit, fused, sequential
from locallearn.schedules import Forward, Train, peak
from locallearn.schedules.actions import check, last_uses

LOCO = Plan.windows(4, 1)


def test_schedules_print() -> None:
    assert " ".join(map(str, sequential(LOCO))) == "F0 F1 T0 F2 T1 F3 T2"
    assert " ".join(map(str, fused(LOCO))) == "F0 F1 F2 F3 T0 T1 T2"


def test_forward_and_train_of_the_same_number_differ() -> None:
    assert Forward(0) != Train(0)


@pytest.mark.parametrize("overlap", range(6))
@pytest.mark.parametrize("lead_in", [False, True])
def test_sequential_keeps_overlap_plus_one_segments(overlap: int, lead_in: bool) -> None:
    plan = Plan.windows(6, overlap, lead_in=lead_in)
    assert peak(plan, check(plan, sequential(plan))) == overlap + 1
    assert peak(plan, check(plan, fused(plan))) == 6


def test_a_stage_is_last_used_by_the_unit_trained_last_among_those_that_walk_through_it() -> None:
    assert last_uses(LOCO, sequential(LOCO)) == {0: 0, 1: 1, 2: 2, 3: 2}
    upside_down = [Forward(0), Forward(1), Forward(2), Forward(3), Train(2), Train(1), Train(0)]
    assert last_uses(LOCO, upside_down) == {0: 0, 1: 0, 2: 1, 3: 2}


def test_a_stage_below_the_lowest_update_is_not_used() -> None:
    plan = Plan(3, [Unit(0, 2, [2])])
    assert last_uses(plan, sequential(plan)) == {2: 0}


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([Forward(0), Forward(2), Forward(1), Train(0), Train(1)], r"runs the stages \[0, 2, 1\]"),
        ([Forward(0), Forward(1), Forward(2), Train(0)], r"trains the units \[0\], not each of the 2 once"),
        ([Forward(0), Forward(1), Forward(2), Train(0), Train(0), Train(1)], "not each of the 2 once"),
        ([Forward(0), Train(0), Forward(1), Forward(2), Train(1)], r"units \[0\] before their last stages"),
    ],
)
def test_a_schedule_that_does_not_carry_out_the_plan_is_refused(actions: list[Forward | Train], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(Plan.windows(3, 1), actions)
