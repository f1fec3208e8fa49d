"""Cuts are found in any backbone, chosen exactly, and what they cost is predicted."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import combinations
from math import inf
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torchvision import models
from zoo import ZOO, RunsTwice, SharedWeight, SkipFromInside, SkipOverCut, conv

from locallearn import ConvMLPDecoder, LocalWrapper, MLPDecoder, Plan, StagePlan, TokenDecoder, plan_stages
from locallearn._fitting.chain import links
from locallearn.memory import Cost, measure, planning
from locallearn.memory.predict import size


def vit_small() -> nn.Module:
    return models.VisionTransformer(224, 16, 12, 6, 384, 1536)


def counted(
    model: nn.Module, plan: StagePlan, overlap: int, decoder: Callable[[int], nn.Module], **options: bool
) -> Cost:

    fake = FakeTensorMode()
    with FakeCopyMode(fake):
        model = deepcopy(model)
    with fake:
        pair = torch.zeros(2, 32, 3, 224, 224).unbind()
        wrapped = LocalWrapper(model, plan.stages, overlap, decoder, **options)
        for weight in wrapped.parameters():
            weight.grad = torch.zeros_like(weight)
        return measure(lambda: wrapped.local_step(*pair))


@pytest.fixture
def single_precision() -> None:
    torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------- where a backbone can be cut


def ends(model: nn.Module, size: int = 64) -> list[str]:
    return [link.end for link in links(model, torch.rand(2, 3, size, size))]


@pytest.mark.parametrize(
    ("make", "some"),
    [
        (models.resnet18, ["maxpool", "layer1.0", "layer1", "layer4", "avgpool"]),
        (models.shufflenet_v2_x0_5, ["conv1", "stage2.0", "stage2", "conv5"]),
        (lambda: timm.create_model("resnet18"), ["maxpool", "layer1.0", "layer1", "layer4"]),
        (lambda: timm.create_model("convnext_atto"), ["stem", "stages.0", "stages.1.blocks.0", "stages"]),
        (ZOO["vit"].build, ["conv_proj", "encoder.layers.encoder_layer_0", "encoder.layers", "encoder"]),
        (ZOO["swin"].build, ["features.0", "features.1", "features.2"]),
    ],
)
def test_cuts_are_found(make: Callable[[], nn.Module], some: list[str]) -> None:
    size = 32 if make in (ZOO["vit"].build, ZOO["swin"].build) else 64
    found = ends(make().double(), size)
    assert [end for end in found if end in some] == some


@pytest.mark.parametrize("stage", ["conv1", "bn1", "conv2", "downsample"])
def test_a_residual_block_is_not_cut_inside(stage: str) -> None:
    assert not any(end.endswith(f"0.{stage}") for end in ends(models.resnet18().double()))


@pytest.mark.parametrize(
    ("backbone", "found"),
    [
        (SkipOverCut, ["stem", "a", "c"]),
        (SkipFromInside, ["stem", "c"]),
        (RunsTwice, ["stem", "a", "c"]),
        (SharedWeight, ["stem", "c"]),
    ],
)
def test_nothing_else_may_pass_a_cut(backbone: type[nn.Module], found: list[str]) -> None:
    assert ends(backbone(), 8) == found


def test_looking_for_cuts_leaves_no_trace() -> None:
    net = ZOO["sequential"].build()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    plan_stages(net, torch.empty(8, 3, 16, 16), 3, decoder=MLPDecoder)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in net.modules())
    assert all(weight.grad is None for weight in net.parameters())


# ---------------------------------------------------------------- which cuts are chosen


def chain(widths: list[int]) -> nn.Sequential:
    return nn.Sequential(*[conv(before, after) for before, after in zip([3, *widths], widths, strict=False)])


@pytest.mark.parametrize("overlap", [0, 1, 2])
@pytest.mark.parametrize("budget", [None, inf])
def test_the_choice_is_the_best_of_all(overlap: int, budget: float | None) -> None:
    net, images = chain([24, 4, 16, 8, 32, 8, 4]), torch.zeros(8, 3, 16, 16)
    plan = plan_stages(net, images, 3, overlap, budget, decoder=MLPDecoder)
    pieces = [piece for stage in plan.pieces for piece in stage]
    assert len(pieces) == 7

    def rating(ends: tuple[int, ...]) -> tuple[float, float]:
        stages = [pieces[a:b] for a, b in zip((0, *ends), (*ends, 7), strict=True)]
        peak = planning._peak(Plan.windows(3, overlap), stages)
        most = max(sum(piece.flops for piece in stage) for stage in stages)
        return (peak, most) if budget is None else (most, peak)

    best = min(combinations(range(1, 7), 2), key=rating)
    assert [len(stage) for stage in plan.pieces] == [best[0], best[1] - best[0], 7 - best[1]]


@pytest.mark.parametrize("head", [nn.Identity, nn.Flatten, lambda: nn.Conv2d(8, 3, 1)])
def test_every_piece_keeps_its_outlet_at_least(head: Callable[[], nn.Module]) -> None:
    net = chain([24, 4, 16, 8]).append(head())
    plan = plan_stages(net, torch.zeros(8, 3, 16, 16), 2)
    assert all(piece.kept >= piece.outlet and piece.held == 0 for stage in plan.pieces for piece in stage)


def test_below_what_is_trained_nothing_is_kept() -> None:
    net = chain([24, 4, 16, 8])
    whole = plan_stages(net, torch.zeros(8, 3, 16, 16), 2)
    net[:2].requires_grad_(False)
    plan = plan_stages(net, torch.zeros(8, 3, 16, 16), 2)
    pieces, before = ([piece for stage in p.pieces for piece in stage] for p in (plan, whole))
    assert [piece.kept == piece.outlet for piece in pieces[:2]] == [True, True]
    assert [piece.weights for piece in pieces] == [0, 0, *(piece.weights for piece in before[2:])]
    assert pieces[3] == before[3]


def test_a_budget_gives_the_most_even_computation_that_fits() -> None:
    net, images = chain([24, 4, 16, 8, 32, 8]), torch.zeros(8, 3, 16, 16)
    least, even = (plan_stages(net, images, 3, 1, budget, decoder=MLPDecoder) for budget in (None, inf))
    assert least.peak() < even.peak()
    assert plan_stages(net, images, 3, 1, even.peak(), decoder=MLPDecoder) == even
    assert plan_stages(net, images, 3, 1, least.peak(), decoder=MLPDecoder).peak() == least.peak()
    with pytest.raises(
        ValueError, match=r"no cuts into 3 stages with overlap 1 fit into 1 B; the least is 1\.85 MB\. Try"
    ):
        plan_stages(net, images, 3, 1, 1, decoder=MLPDecoder)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (1, "1 B"),
        (999, "999 B"),
        (999.7, "1 kB"),
        (4100, "4.1 kB"),
        (8.2e8, "820 MB"),
        (1e9, "1 GB"),
        (5e15, "5,000 TB"),
    ],
)
def test_bytes_are_told_in_the_unit_that_fits(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("settings", "problem", "message"),
    [
        ({"budget": torch.nan}, ValueError, "budget is a number of bytes, more than 0; got nan"),
        ({"budget": -1}, ValueError, "budget is a number of bytes, more than 0; got -1"),
        ({"budget": "8GB"}, TypeError, "budget is a number of bytes, such as 8e9; got '8GB'"),
        ({"n": 2.5}, TypeError, "n, the number of stages, is a whole number, at least 1; got 2.5"),
        ({"n": "4"}, TypeError, "n, the number of stages, is a whole number, at least 1; got '4'"),
        ({"n": 0}, ValueError, "n, the number of stages, is a whole number, at least 1; got 0"),
        ({"overlap": 1.5}, TypeError, "overlap is a whole number, at least 0; got 1.5"),
        ({"overlap": None}, TypeError, "overlap is a whole number, at least 0; got None"),
        ({"ranks": 1.5}, TypeError, "ranks is a whole number, at least 0; got 1.5"),
    ],
)
def test_settings_of_another_kind_are_refused(settings: dict[str, Any], problem: type[Exception], message: str) -> None:
    with pytest.raises(problem, match=message):
        plan_stages(chain([4, 4, 4]), torch.zeros(2, 3, 8, 8), **settings)


def test_too_few_places_are_named() -> None:
    with pytest.raises(ValueError, match=r"4 stages need as many pieces.*\['0', '1', '2'\]"):
        plan_stages(chain([4, 4, 4]), torch.zeros(2, 3, 8, 8), 4)


def test_a_decoder_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="fits too few outlets"):
        plan_stages(chain([4, 4, 4]), torch.zeros(2, 3, 8, 8), 2, decoder=TokenDecoder)


def test_auto_is_the_plan_for_64_images() -> None:
    net, example = chain([24, 4, 16, 8]), torch.rand(2, 3, 16, 16)
    model = LocalWrapper(net, "auto", example=example)
    assert model.stages == plan_stages(net, torch.rand(64, 3, 16, 16)).stages
    model.local_step(*torch.rand(2, 2, 3, 16, 16))
    assert len(LocalWrapper(net, "auto", plan=Plan.windows(3, 0), example=example).stages) == 3


def test_auto_needs_a_decoder_that_fits_any_width() -> None:
    with pytest.raises(TypeError, match="stages='auto' needs a decoder= that makes a module from a width"):
        LocalWrapper(models.resnet18().double(), "auto", decoder=[MLPDecoder(8)] * 3)


# ---------------------------------------------------------------- what is predicted


@pytest.mark.usefixtures("single_precision")
@pytest.mark.parametrize(
    ("make", "decoder"),
    [
        (models.resnet50, ConvMLPDecoder),
        (models.shufflenet_v2_x1_0, ConvMLPDecoder),
        (vit_small, TokenDecoder),
        (models.convnext_tiny, ConvMLPDecoder),
    ],
    ids=["resnet50", "shufflenet", "vit", "convnext"],
)
def test_the_peak_is_predicted_within_a_tenth(
    make: Callable[[], nn.Module], decoder: Callable[[int], nn.Module]
) -> None:
    net = make()
    plan = plan_stages(net, decoder=decoder)
    for checkpoint in (False, True):
        cost = counted(net, plan, 1, decoder, checkpoint=checkpoint)
        assert plan.peak(checkpoint=checkpoint) == pytest.approx(cost.peak_bytes, rel=0.1)


@pytest.mark.usefixtures("single_precision")
def test_automatic_cuts_of_a_resnet50_save_more_than_the_papers() -> None:
    net = models.resnet50()
    plan = plan_stages(net)
    simclr, loco = counted(net, plan, 3, MLPDecoder), counted(net, plan, 1, ConvMLPDecoder)
    assert plan.peak() == pytest.approx(loco.peak_bytes, rel=0.02)
    assert simclr.saved_bytes >= 1.7 * loco.saved_bytes
    assert simclr.peak_bytes >= 1.5 * loco.peak_bytes


def test_the_plan_prints_as_a_table() -> None:
    text = str(plan_stages(chain([24, 4, 16, 8]), torch.zeros(8, 3, 16, 16), 2))
    assert [line.split()[0] for line in text.splitlines() if line] == [
        *("stage", "0", "1", "trained:", "predicted", "end-to-end", "Greedy", "LoCo")
    ]
