"""Plans are integers that print as drawings."""

from __future__ import annotations

import pytest

from locallearn import Plan, Unit


def test_windows_of_every_overlap() -> None:
    assert [(u.first, u.last) for u in Plan.windows(4, 0).units] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert [(u.first, u.last) for u in Plan.windows(4, 1).units] == [(0, 1), (1, 2), (2, 3)]
    assert [(u.first, u.last) for u in Plan.windows(4, 3).units] == [(0, 3)]


def test_a_unit_updates_what_it_reaches_unless_told_otherwise() -> None:
    assert Unit(1, 3).updates == (1, 2, 3)
    assert Unit(1, 3, [3, 1]).updates == (1, 3)


def test_a_gradient_crosses_the_cuts_between_the_lowest_stage_it_updates_and_its_loss() -> None:
    plan = Plan(5, [Unit(0, 2), Unit(1, 3, updates=[2, 3]), Unit(4, 4)])
    first, second, _ = plan.units
    assert plan.spanning() == [[first], [first], [second], [], []]


def test_lead_in_adds_the_truncated_units_at_the_bottom() -> None:
    assert [(u.first, u.last) for u in Plan.windows(4, 2, lead_in=True).units] == [(0, 0), (0, 1), (0, 2), (1, 3)]


def test_first_blocks_share_only_the_first_piece_of_the_next_stage() -> None:
    plan = Plan.first_blocks(4)
    assert plan.stages == 7
    assert [(u.first, u.last) for u in plan.units] == [(0, 1), (1, 3), (3, 5), (5, 6)]
    assert Plan.first_blocks(1) == Plan.windows(1, 0)


def test_a_union_has_the_units_of_all_its_plans_from_bottom_to_top_and_each_once() -> None:
    plan = Plan.union(Plan.windows(3, 2), Plan.windows(3, 1, lead_in=True), Plan.windows(3, 0))
    assert [(u.first, u.last) for u in plan.units] == [(0, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 2)]
    assert Plan.union(plan, plan) == plan
    updating = Plan(3, [Unit(0, 1, [0])])
    assert len(Plan.union(updating, Plan.windows(3, 1)).units) == 3  # it differs in what it updates


def test_methods_of_others_are_settings_of_windows_and_unions() -> None:
    assert Plan.greedy(4) == Plan.windows(4, 0)
    assert Plan.end_to_end(4) == Plan.windows(4, 3)
    assert Plan.deep_supervision(4) == Plan(4, [Unit(0, k) for k in range(4)])
    assert Plan.hierarchical(4) == Plan.union(Plan.windows(4, 0), Plan.windows(4, 1))


def test_a_plan_prints_as_a_drawing() -> None:
    assert str(Plan(3, [Unit(0, 1, [0]), Unit(1, 2)])).splitlines() == [
        "        stage 0  1  2",
        "unit 0        #  .",
        "unit 1           #  #",
    ]


def test_plans_are_equal_by_value_and_hashable() -> None:
    assert Plan.windows(4, 1) == Plan.windows(4, 1) != Plan.windows(4, 2)
    assert len({Plan.windows(4, 1), Plan.windows(4, 1)}) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan.windows(4, 4), "overlap=4 needs at least 5 stages; there are 4"),
        (lambda: Plan.windows(1, 1), "overlap=1 needs at least 2 stages; there is 1"),
        (lambda: Plan.windows(4, -1), "overlap is at least 0"),
        (lambda: Plan.windows(0, 0), "at least one stage"),
        (lambda: Unit(2, 1), "first=2, last=1"),
        (lambda: Unit(1, 2, [0]), r"updates=\[0\]"),
        (lambda: Unit(1, 2, []), "updates at least one"),
        (lambda: Plan(2, [Unit(0, 2)]), "beyond the last stage, 1"),
        (lambda: Plan(2, []), "at least one unit"),
        (Plan.union, r"the same number of stages; got plans for \[\] stages"),
        (lambda: Plan.union(Plan.greedy(2), Plan.greedy(3)), r"got plans for \[2, 3\] stages"),
        (lambda: Plan.hierarchical(1), "overlap=1 needs at least 2 stages; there is 1"),
        (lambda: Plan.deep_supervision(0), "at least one stage"),
        (lambda: Plan(2, [Unit(1, 1), Unit(0, 0)]), r"from bottom to top; got units whose last stages are \[1, 0\]"),
    ],
)
def test_refusals_say_what_was_given_and_what_fits(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_plan_imports_no_torch() -> None:
    import ast
    import inspect

    import locallearn.plan

    imported = {
        node.module if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(ast.parse(inspect.getsource(locallearn.plan)))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {"__future__", "collections.abc", "dataclasses", "operator", "typing"}
