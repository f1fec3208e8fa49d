"""Local gradients beside end-to-end ones, against plain autograd in float64."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diagnosis.state import assert_same, state_of
from torch import Tensor, nn

from locallearn import InfoNCE, LocalWrapper, MLPDecoder, Plan, Soft, UpperOnly
from locallearn.diagnosis import gradient_agreement


def blocks(dropout: float = 0.0) -> nn.Sequential:
    def block(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(width, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Dropout(dropout))

    return nn.Sequential(*[block(3 if k == 0 else 6) for k in range(4)])


def views() -> tuple[Tensor, Tensor]:
    one, two = torch.rand(2, 5, 3, 8, 8)
    return one, two


def vector(model: LocalWrapper, stage: int, kind: type[nn.Module] | None = None) -> Tensor:
    parts = [part for part in model.backbone[stage].modules() if kind is None or isinstance(part, kind)]
    weights = [w for part in parts for w in part.parameters(recurse=False)]
    return torch.cat([w.grad.flatten() if w.grad is not None else torch.zeros(w.numel()) for w in weights])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("overlap", [0, 1, 2])
@pytest.mark.parametrize(
    "make", [lambda o: {"overlap": o}, lambda o: {"plan": UpperOnly().plan(4, o)}], ids=["hard", "upper"]
)
def test_it_compares_what_local_step_gives_with_the_top_loss_alone(
    overlap: int, make: Callable[[int], dict[str, Any]]
) -> None:
    model, pair = LocalWrapper(blocks(), [0, 1, 2, 3], decoder=MLPDecoder, **make(overlap)), views()
    report = gradient_agreement(model, *pair)
    local, whole = deepcopy(model), deepcopy(model)
    local.local_step(*pair)
    outputs = whole.decoders[-1](whole.backbone(torch.cat(pair))).chunk(2)
    InfoNCE()(*outputs).backward()
    for number, stage in enumerate(report.stages):
        one, other = vector(local, number), vector(whole, number)
        assert stage.whole.cosine == pytest.approx(cosine(one, other), abs=1e-9)
        assert stage.whole.norm_ratio == pytest.approx(float(one.norm() / other.norm()), rel=1e-9)
        assert list(stage.groups) == ["Conv2d", "BatchNorm2d"]
        group = vector(local, number, nn.BatchNorm2d), vector(whole, number, nn.BatchNorm2d)
        assert stage.groups["BatchNorm2d"].cosine == pytest.approx(cosine(*group), abs=1e-9)
    assert report.stages[3].whole.cosine == pytest.approx(1)
    assert report.losses == pytest.approx(local.losses.tolist())


def test_the_units_that_meet_in_a_stage_are_compared() -> None:
    model, pair = LocalWrapper(blocks(), [0, 1, 2, 3], 1, MLPDecoder), views()
    report = gradient_agreement(model, *pair)
    assert [list(stage.units) for stage in report.stages] == [[], [(0, 1)], [(1, 2)], []]
    own = []
    for k in (0, 1):  # each by itself
        plan = Plan(4, [model.plan.units[k]])
        alone = LocalWrapper(deepcopy(model.backbone), [0, 1, 2, 3], decoder=[deepcopy(model.decoders[k])], plan=plan)
        alone.local_step(*pair)
        own.append(vector(alone, 1))
    found = report.stages[1].units[0, 1]
    assert found.cosine == pytest.approx(cosine(*own), abs=1e-9)
    assert found.norm_ratio == pytest.approx(float(own[1].norm() / own[0].norm()), rel=1e-9)


def test_opposed_losses_are_in_conflict() -> None:
    plan = Plan(1, [*Plan.greedy(1).units, *Plan.greedy(1).units])
    decoder = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    model = LocalWrapper(
        nn.Sequential(nn.Linear(3, 4)),
        [0],
        plan=plan,
        decoder=[decoder, deepcopy(decoder)],
        loss=[lambda z: z.sum(), lambda z: -2 * z.sum()],
        example=torch.rand(2, 3),
    )
    stage = gradient_agreement(model, torch.rand(5, 3)).stages[0]
    assert stage.units[0, 1].cosine == pytest.approx(-1)
    assert stage.units[0, 1].norm_ratio == pytest.approx(2)
    assert (stage.whole.cosine, stage.whole.norm_ratio) == (pytest.approx(1), pytest.approx(0.5))


def test_soft_sharings_penalty_is_a_part_of_the_local_gradient() -> None:
    model, pair = LocalWrapper(blocks(), [0, 1, 2, 3], 1, MLPDecoder, sharing=Soft(10.0)), views()
    with torch.no_grad():
        model.backbone[2][0].weight.add_(0.5)
    report = gradient_agreement(model, *pair)
    local = deepcopy(model)
    local.local_step(*pair)
    whole = deepcopy(model)
    InfoNCE()(*whole.decoders[-1](whole.backbone(torch.cat(pair))).chunk(2)).backward()
    assert report.stages[2].whole.cosine == pytest.approx(cosine(vector(local, 2), vector(whole, 2)), abs=1e-9)


def test_a_stage_that_nothing_trains_has_no_angle() -> None:
    model = LocalWrapper(blocks(), [0, 1, 2, 3], decoder=MLPDecoder, plan=Plan(4, Plan.greedy(4).units[2:3]))
    model.backbone[1].requires_grad_(requires_grad=False)
    stages = gradient_agreement(model, *views()).stages
    assert (stages[0].whole.cosine, stages[0].whole.norm_ratio) == (None, 0)
    assert (stages[1].whole.cosine, stages[1].whole.norm_ratio, stages[1].groups) == (None, None, {})
    assert stages[3].whole.cosine is None


def test_groups_may_be_named() -> None:
    model = LocalWrapper(blocks(), [0, 1, 2, 3], decoder=MLPDecoder)
    report = gradient_agreement(model, *views(), groups=lambda name, weight: f"{weight.ndim}-d")
    assert list(report.stages[0].groups) == ["4-d", "1-d"]


def test_gradients_that_are_not_finite_have_no_angle() -> None:
    model = LocalWrapper(blocks(), [0, 1, 2, 3], decoder=MLPDecoder)
    report = gradient_agreement(model, *(view * torch.nan for view in views()))
    assert all(math.isnan(stage.whole.cosine) and math.isnan(stage.whole.norm_ratio) for stage in report.stages)
    assert "+" not in str(report)


def test_it_works_in_inference_mode() -> None:
    model = LocalWrapper(blocks(), [0, 1, 2, 3], decoder=MLPDecoder)
    pair = views()
    expected = gradient_agreement(model, *pair)
    with torch.inference_mode():
        assert gradient_agreement(model, *(view.clone() for view in pair)) == expected


def test_everything_stays_as_it_was() -> None:
    model, pair = LocalWrapper(blocks(dropout=0.5), [0, 1, 2, 3], 1, MLPDecoder), views()
    model.backbone[1].eval()
    model.local_step(*pair)
    before = state_of(model)
    one = gradient_agreement(model, *pair)
    assert_same(model, before)
    assert gradient_agreement(model, *pair) == one  # the same dropout
    with torch.no_grad():
        assert gradient_agreement(model, *pair) == one


def test_it_prints_saves_and_gives_plain_numbers(tmp_path: Path) -> None:
    reports = {
        f"overlap {o}": gradient_agreement(LocalWrapper(blocks(), [0, 1, 2, 3], o, MLPDecoder), *views())
        for o in (0, 1)
    }
    report = reports["overlap 1"]
    rows = [line[:34].strip() for line in str(report).splitlines()]
    assert rows[:4] == ["local against end-to-end", "stage 0, ends after 0", "Conv2d", "BatchNorm2d"]
    assert rows[-2:] == ["stage 1, units 0 and 1", "stage 2, units 1 and 2"]
    again = json.loads(json.dumps(report.as_dict()))
    assert again["stages"][1]["units"][0]["units"] == [0, 1]
    assert again["stages"][1]["groups"]["Conv2d"]["cosine"] == report.stages[1].groups["Conv2d"].cosine
    report.save(tmp_path / "one.png")
    report.save(tmp_path / "two.png", beside=reports)
    assert (tmp_path / "one.png").read_bytes()[:4] == (tmp_path / "two.png").read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_be_compared_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = LocalWrapper(blocks(), [0, 1, 2, 3], decoder=MLPDecoder)
    with pytest.raises(TypeError, match="looked at in a LocalWrapper; got Sequential"):
        gradient_agreement(model.backbone, *views())
    with pytest.raises(TypeError, match=r"got Parallel\. Take what it wraps, `.module`"):
        gradient_agreement(Parallel(model), *views())
    with pytest.raises(ValueError, match="at least one view; got none"):
        gradient_agreement(model)
    with pytest.raises(TypeError, match=r"got \['list'\]"):
        gradient_agreement(model, [1, 2])
    with pytest.raises(TypeError, match=r"groups is called with the name and the weight, .*; got 'x'"):
        gradient_agreement(model, *views(), groups="x")
    report = gradient_agreement(model, *views())
    with pytest.raises(ValueError, match=r"a picture is .*png.*; got '.*no.foo', of the format '.foo'"):
        report.save(tmp_path / "new" / "no.foo")
    assert not (tmp_path / "new").exists()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"GradientAgreement.save draws with matplotlib.*pip install matplotlib"
    ):
        report.save(tmp_path / "no.png")


class Parallel(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
