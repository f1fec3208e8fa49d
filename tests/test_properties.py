"""Chains of random modules, random cuts, plans and schedules: always the oracle's gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_same, gradients, oracle
from torch import Tensor, nn

from locallearn import LocalWrapper, MLPDecoder, Plan, Unit
from locallearn.schedules import Action, Forward, Train


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).tanh()


class UsedTwice(nn.Module):
    """One convolution, twice within a stage."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(self.inner(x).sigmoid())
        return result


class HalfUsed(nn.Module):
    """A part of the weights never runs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.used, self.unused = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.used(x)
        return result


PARTS: list[Callable[[int], nn.Module]] = [
    lambda width: nn.Conv2d(width, width, 3, padding=1, bias=False),
    lambda width: nn.Conv2d(width, width, 1, groups=width),
    nn.BatchNorm2d,
    lambda width: nn.GroupNorm(1, width),
    lambda width: nn.ReLU(),
    lambda width: nn.Hardtanh(),
    lambda width: nn.Identity(),
    lambda width: nn.Dropout(0.25),
    Residual,
    UsedTwice,
    HalfUsed,
]


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


@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_chain_plan_and_schedule_give_the_oracles_gradients(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**16), label="seed"))
    parts = data.draw(st.lists(st.sampled_from(range(len(PARTS))), min_size=2, max_size=7), label="parts")
    backbone = nn.Sequential(*[PARTS[part](4) for part in parts])
    cuts = sorted(data.draw(st.sets(st.integers(0, len(parts) - 1), min_size=1, max_size=5), label="cuts"))
    plan = data.draw(plans(len(cuts)), label="plan")
    actions = data.draw(schedules(plan), label="schedule")
    for index in data.draw(st.sets(st.integers(0, len(parts) - 1), max_size=2), label="frozen"):
        backbone[index].requires_grad_(False)
    model = LocalWrapper(
        backbone,
        cuts,
        plan=plan,
        decoder=lambda width: MLPDecoder(width, out_features=6),
        schedule=lambda plan: actions,
        example=torch.rand(2, 4, 4, 4),
    )
    pair = torch.randn(2, 3, 4, 4, 4).unbind()
    state = torch.get_rng_state()
    losses, expected = oracle(model, *pair)
    torch.set_rng_state(state)
    by_step = model.local_step(*pair)
    torch.testing.assert_close(by_step, losses)
    assert_same(gradients(model), expected, tolerance=1e-8)
    model.zero_grad()
    torch.set_rng_state(state)
    model(*pair).backward()
    assert_same(gradients(model), expected, tolerance=1e-8)
