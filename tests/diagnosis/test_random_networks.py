"""Random networks, cuts and plans: agreement is that of two oracles' gradients, and a monitored pass is a pass.

CI takes a fixed sample; ``--cases 500`` takes as many new ones.
"""

from __future__ import annotations

import copy

import pytest
import torch
from diagnosis.state import assert_same, state_of
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from random_networks import Drawn, networks

from locallearn import LocalWrapper, MLPDecoder, Plan, Unit
from locallearn.diagnosis import Monitor, gradient_agreement, stage_quality
from locallearn.testing import local_gradients

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # on what has images for its input


def compare(drawn: Drawn, data: st.DataObject) -> None:
    sizes = [sum(w.numel() for w in drawn.backbone.parameters() if w.requires_grad is kind) for kind in (False, True)]
    assume(sizes[0] <= sizes[1])  # frozen weights that outweigh the trained ones are not put back after a forward
    n = len(drawn.cuts)
    overlap = data.draw(st.integers(0, n - 1), label="overlap")
    lead_in = data.draw(st.booleans(), label="lead_in")
    model = LocalWrapper(
        drawn.backbone,
        drawn.cuts,
        plan=Plan.windows(n, overlap, lead_in=lead_in),
        decoder=lambda width: MLPDecoder(width, out_features=6),
        example=torch.rand(2, 4, 4, 4),
    )
    top = LocalWrapper(
        copy.deepcopy(drawn.backbone),
        drawn.cuts,
        plan=Plan(n, [Unit(0, n - 1)]),
        decoder=[copy.deepcopy(model.decoders[-1])],
        example=torch.rand(2, 4, 4, 4),
    )
    pair = torch.randn(2, 3, 4, 4, 4).unbind()
    before = state_of(model)
    local = local_gradients(model, *pair)
    assert_same(model, before)
    whole = local_gradients(top, *pair)
    report = gradient_agreement(model, *pair)
    assert_same(model, before)
    stage_quality(model, [(pair[0], torch.arange(3))], [(pair[1], torch.arange(3))], linear_probe=False)
    assert_same(model, before)
    for number, stage in enumerate(report.stages):
        names = [name for name, at in whole.stages.items() if at == number]
        one, other = (
            torch.cat(
                [g.get(name, torch.zeros_like(model.get_parameter(name))).flatten() for name in names]
                or [torch.zeros(0)]
            )
            for g in (local.gradients, whole.gradients)
        )
        one, other = (torch.view_as_real(g).flatten() if g.is_complex() else g for g in (one, other))
        if other.norm() > 1e-12:
            assert stage.whole.norm_ratio == pytest.approx(float(one.norm() / other.norm()), rel=1e-6, abs=1e-9)
        if min(one.norm(), other.norm()) > 1e-12:
            assert stage.whole.cosine == pytest.approx(float(one @ other / (one.norm() * other.norm())), abs=1e-6)

    watched = copy.deepcopy(model)
    for each in (model, watched):
        with torch.random.fork_rng():
            monitor = Monitor(each, every=1) if each is watched else None
            each.local_step(*pair)
    assert monitor is not None
    flat = monitor.read()
    monitor.close()
    assert len(flat) == 4 * len(model.plan.units)
    assert [flat[f"loss/unit_{k}"] for k in range(len(model.plan.units))] == model.losses.tolist()
    assert_same(watched, state_of(model) | {"losses": watched.losses})


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(drawn=networks(), data=st.data())
def test_a_fixed_sample(drawn: Drawn, data: st.DataObject) -> None:
    compare(drawn, data)


def test_new_ones(request: pytest.FixtureRequest) -> None:
    cases = request.config.getoption("--cases")
    if not cases:
        pytest.skip("--cases N draws N new ones")
    settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))(
        given(drawn=networks(), data=st.data())(compare)
    )()
