"""Random networks, cuts, plans, schedules and recomputation: always the oracle's gradients.

CI takes a fixed sample. ``pytest tests/walk/test_properties.py --cases 3000`` takes as many new ones, twenty minutes of them.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracle import assert_same, gradients
from random_networks import Drawn, networks

from locallearn import LocalWrapper, MLPDecoder, Plan, Unit
from locallearn.schedules import Action, Forward, Train
from locallearn.testing import local_gradients

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # on what has images for its input


@st.composite
def plans(draw: st.DrawFn, stages: int) -> Plan:
    units = []
    for _ in range(draw(st.integers(1, 4))):
        first = draw(st.integers(0, stages - 1))
        last = draw(st.integers(first, stages - 1))
        updates = draw(st.sets(st.integers(first, last), min_size=1))
        units.append(Unit(first, last, updates))
    return Plan(stages, sorted(units, key=lambda unit: unit.last))


@st.composite
def schedules(draw: st.DrawFn, plan: Plan) -> list[Action]:
    """Any order in which every unit is trained some time after its last stage has run."""
    actions: list[Action] = [Forward(stage) for stage in range(plan.stages)]
    for k in draw(st.permutations(range(len(plan.units)))):
        earliest = actions.index(Forward(plan.units[k].last)) + 1
        actions.insert(draw(st.integers(earliest, len(actions))), Train(k))
    return actions


def compare(drawn: Drawn, data: st.DataObject) -> None:
    plan = data.draw(plans(len(drawn.cuts)), label="plan")
    actions = data.draw(schedules(plan), label="schedule")
    try:
        model = LocalWrapper(
            drawn.backbone,
            drawn.cuts,
            plan=plan,
            decoder=lambda width: MLPDecoder(width, out_features=6),
            schedule=lambda plan: actions,
            example=torch.rand(2, 4, 4, 4),
            checkpoint=drawn.policy,
            features=drawn.features,
        )
    except ValueError as error:
        assert "chooses no submodule" in str(error)  # noqa: PT017 - this network has none of those
        return
    pair = torch.randn(2, 3, 4, 4, 4).unbind()
    state = torch.get_rng_state()
    losses, _, expected, buffers, *_ = local_gradients(model, *pair)
    again = copy.deepcopy(model)
    for entry in ("step", "call"):
        torch.set_rng_state(state)
        if entry == "step":
            by_step = model.local_step(*pair)
        else:
            model = again
            model(*pair).backward()
            by_step = model.losses
        torch.testing.assert_close(by_step, losses, rtol=1e-3 if drawn.single else 1e-8, atol=1e-10)
        if expected and drawn.single:  # what rounding leaves of a small gradient is as large as of a large one
            assert_same(gradients(model), expected, tolerance=1e-4, floor=1.0)
        elif expected:
            assert_same(gradients(model), expected, tolerance=1e-8)
        else:
            assert not any(g.any() for g in gradients(model).values())
        ours = {name: buffer for name, buffer in model.named_buffers() if name in buffers}
        torch.testing.assert_close(ours, buffers)
        assert not any({"forward", "_compiled_call_impl"} & part.__dict__.keys() for part in model.backbone.modules())


def test_any_network_plan_schedule_and_recomputation_give_the_oracles_gradients(request: pytest.FixtureRequest) -> None:
    cases = request.config.getoption("--cases")
    phases = [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink]

    @given(data=st.data())
    @settings(
        max_examples=cases or 200,
        derandomize=not cases,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    def check(data: st.DataObject) -> None:
        compare(data.draw(networks(), label="network"), data)

    check()
