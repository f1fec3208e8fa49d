"""The gradients of a local pass equal the oracle's, over backbones, plans, sharing, schedules and entry points.

CI runs a fixed sample in which every value of every axis occurs; ``pytest tests/walk/test_local_pass.py --full`` the whole cross.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from oracle import assert_same, gradients, oracle
from torch import Tensor, nn
from zoo import ZOO, Specimen, small_net

from locallearn import ConvMLPDecoder, InfoNCE, LocalWrapper, MLPDecoder, Plan, Unit, UpperOnly, fused, sequential

PLANS: dict[str, Callable[[int], Plan]] = {
    "overlap 0": lambda n: Plan.windows(n, 0),
    "overlap 1": lambda n: Plan.windows(n, 1),
    "overlap 2": lambda n: Plan.windows(n, 2),
    "overlap 3": lambda n: Plan.windows(n, 3),
    "lead-in": lambda n: Plan.windows(n, 1, lead_in=True),
    "lead-in 2": lambda n: Plan.windows(n, 2, lead_in=True),
    "upper only": lambda n: UpperOnly().plan(n, 1),
    "upper only 2": lambda n: UpperOnly().plan(n, 2),
    "gaps in updates": lambda n: Plan(n, [Unit(0, 1, [0]), Unit(0, n - 1, [0, n - 1])]),
    "nothing above": lambda n: Plan(n, [Unit(0, 0), Unit(0, 1)]),
    "nothing below": lambda n: Plan(n, [Unit(n - 2, n - 1), Unit(1, n - 1, [n - 1])]),
    "two losses on one outlet": lambda n: Plan(n, [Unit(0, 1), Unit(1, 1), Unit(1, 2)]),
}
SCHEDULES = {"sequential": sequential, "fused": fused}
ENTRIES: dict[str, Callable[..., Tensor]] = {}
Case = tuple[str, str, str, str]


def step(model: LocalWrapper, *views: Tensor) -> Tensor:
    return model.local_step(*views)


def call(model: LocalWrapper, *views: Tensor) -> Tensor:
    total = model(*views)
    assert all(p.grad is None for p in model.parameters()), "a gradient arrived before backward"
    total.backward()
    assert model.losses is not None
    assert total.item() == pytest.approx(model.losses.sum().item(), rel=1e-12)
    return model.losses


ENTRIES = {"step": step, "call": call}


def cases(full: bool) -> list[Case]:
    """Every backbone with every plan; in the sample, schedules and entries take turns, so that each meets all of both."""
    ways = list(product(SCHEDULES, ENTRIES))
    cross: list[Case] = []
    for at, plan in enumerate(PLANS):
        fitting = [name for name in ZOO if plan != "overlap 3" or len(ZOO[name].stages) > 3]
        for turn, backbone in enumerate(fitting, start=at):
            cross += [(backbone, plan, *way) for way in (ways if full else [ways[turn % 4]])]
    return cross


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "schedule" in metafunc.fixturenames:
        metafunc.parametrize(("backbone", "plan", "schedule", "entry"), cases(metafunc.config.getoption("--full")))


def wrapped(specimen: Specimen, plan: Plan, schedule: str = "sequential") -> LocalWrapper:
    return LocalWrapper(
        specimen.build(),
        specimen.stages,
        plan=plan,
        decoder=specimen.decoder,
        schedule=SCHEDULES[schedule],
        example=specimen.views(2)[0],
    )


def compare(model: LocalWrapper, views: tuple[Tensor, ...], entry: str) -> None:
    state = torch.get_rng_state()
    losses, expected = oracle(model, *views)
    torch.set_rng_state(state)
    ours = ENTRIES[entry](model, *views)
    torch.testing.assert_close(ours, losses, rtol=1e-12, atol=0)
    assert_same(gradients(model), expected)


def test_gradients_equal_the_oracle(backbone: str, plan: str, schedule: str, entry: str) -> None:
    specimen = ZOO[backbone]
    compare(wrapped(specimen, PLANS[plan](len(specimen.stages)), schedule), specimen.views(), entry)


def test_the_sample_has_every_pair_of_values() -> None:
    sample, everything = cases(full=False), cases(full=True)
    for one, other in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]:
        assert {(case[one], case[other]) for case in sample} == {(case[one], case[other]) for case in everything}


@pytest.mark.parametrize("backbone", ZOO)
def test_full_overlap_is_plain_end_to_end_training(backbone: str) -> None:
    specimen = ZOO[backbone]
    model = wrapped(specimen, Plan.windows(len(specimen.stages), len(specimen.stages) - 1))
    views = specimen.views()
    state = torch.get_rng_state()
    model.local_step(*views)
    ours = gradients(model)
    model.zero_grad()

    torch.set_rng_state(state)
    outlets: list[Tensor] = []
    last = model.backbone.get_submodule(specimen.stages[-1])
    handle = last.register_forward_hook(lambda module, args, output: outlets.append(output))
    model.backbone(torch.cat(views))
    handle.remove()
    InfoNCE()(*model.decoders[0](outlets[0]).chunk(2)).backward()
    assert_same(ours, gradients(model))


def test_nothing_outside_a_unit_gets_a_gradient_from_its_loss() -> None:
    for k, updated in enumerate([{0, 1}, {1, 2}]):
        model = LocalWrapper(small_net(), [0, 1, 2], decoder=MLPDecoder, example=torch.rand(2, 3, 8, 8))
        silent = [InfoNCE(), InfoNCE()]
        model.loss = nn.ModuleList(loss if at == k else Silent() for at, loss in enumerate(silent))
        model.local_step(*torch.rand(2, 4, 3, 8, 8).unbind())
        trained = {int(name[0]) for name, g in gradients(model.backbone).items() if g.norm() > 0}
        assert trained == updated


class Silent(nn.Module):
    """A loss whose gradient is zero."""

    def forward(self, *outputs: Tensor) -> Tensor:
        return sum(output.sum() * 0 for output in outputs)  # type: ignore[return-value]


def test_gradients_accumulate_over_steps() -> None:
    model = LocalWrapper(small_net(), [0, 1, 2], decoder=MLPDecoder, example=torch.rand(2, 3, 8, 8))
    first, second = (torch.rand(2, 4, 3, 8, 8).unbind() for _ in range(2))
    expected = oracle(model, *first)[1]
    for name, gradient in oracle(model, *second)[1].items():
        expected[name] += gradient
    model.local_step(*first)
    model.local_step(*second)
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_three_views(overlap: int) -> None:
    model = LocalWrapper(
        small_net(),
        [0, 1, 2],
        overlap,
        MLPDecoder,
        example=torch.rand(2, 3, 8, 8),
        loss=lambda a, b, c: (a * b * c).mean(),
    )
    compare(model, torch.rand(3, 4, 3, 8, 8).unbind(), "step")


def test_one_view_with_targets() -> None:
    model = LocalWrapper(
        small_net(),
        [0, 1, 2],
        decoder=lambda width: MLPDecoder(width, out_features=5),
        example=torch.rand(2, 3, 8, 8),
        loss=nn.CrossEntropyLoss(),
    )
    images, labels = torch.rand(6, 3, 8, 8), torch.arange(6) % 5
    losses, expected = oracle(model, images, targets=labels)
    torch.testing.assert_close(model.local_step(images, targets=labels), losses)
    assert_same(gradients(model), expected)
    model.zero_grad()
    model(images, targets=labels).backward()
    assert_same(gradients(model), expected)


def test_loss_weights_are_trained_whether_shared_or_one_per_unit() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return InfoNCE()(a * self.scale, b) + (a - b).square().mean() * self.scale

    views = torch.rand(2, 4, 3, 8, 8).unbind()
    for loss in (Scaled(), [Scaled(), Scaled()]):
        model = LocalWrapper(small_net(), [0, 1, 2], decoder=MLPDecoder, example=torch.rand(2, 3, 8, 8), loss=loss)
        assert any(name.startswith("loss.") for name, _ in model.named_parameters())
        compare(model, views, "step")
        model.zero_grad()
        compare(model, views, "call")


def test_default_decoder_on_a_small_resnet() -> None:
    specimen = ZOO["resnet18"]
    model = LocalWrapper(specimen.build(), specimen.stages, example=specimen.views(2)[0])
    assert all(isinstance(decoder, ConvMLPDecoder) for decoder in model.decoders)
    compare(model, specimen.views(), "step")
