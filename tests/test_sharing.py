"""The rows of Table 5."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import assert_same, gradients, oracle
from torch import Tensor, nn
from zoo import ZOO, small_net

from locallearn import ConvMLPDecoder, Hard, LocalWrapper, MLPDecoder, Plan, Soft, Unit, UpperOnly
from locallearn.sharing import Sharing

EXAMPLE = (2, 3, 8, 8)


def wrap(**options: object) -> LocalWrapper:
    options = {"stages": [0, 1, 2], "decoder": MLPDecoder, "example": torch.rand(EXAMPLE), **options}
    return LocalWrapper(small_net(), **options)  # type: ignore[arg-type]


def views() -> tuple[Tensor, ...]:
    return torch.rand(2, 4, 3, 8, 8).unbind()


@pytest.mark.parametrize("overlap", range(4))
def test_hard_sharing_is_windows(overlap: int) -> None:
    assert Hard().plan(4, overlap) == Plan.windows(4, overlap)


@pytest.mark.parametrize("overlap", range(4))
def test_upper_only_updates_each_stage_once_and_reaches_the_same(overlap: int) -> None:
    plan = UpperOnly().plan(5, overlap)
    assert [(u.first, u.last) for u in plan.units] == [(u.first, u.last) for u in Plan.windows(5, overlap).units]
    assert sorted(stage for unit in plan.units for stage in unit.updates) == list(range(5))
    assert plan.units[-1].updates[-1] == 4


def test_upper_only_lets_the_lower_units_gradient_through() -> None:
    """The lowest stage still hears from the loss above the shared stage."""
    model = wrap(sharing=UpperOnly())
    pair = views()
    expected = oracle(model, *pair)[1]
    model.local_step(*pair)
    assert_same(gradients(model), expected)
    assert gradients(model)["backbone.0.weight"].norm() > 0


def test_sharing_one_block_is_a_finer_cut_and_a_plan() -> None:
    specimen = ZOO["resnet18"]
    stages = ["layer1", "layer2.0", "layer2", "layer3.0", "layer3", "layer4.0", "layer4"]
    model = LocalWrapper(
        specimen.build(), stages, plan=Plan.first_blocks(4), decoder=specimen.decoder, example=specimen.views(2)[0]
    )
    pair = specimen.views()
    expected = oracle(model, *pair)[1]
    model.local_step(*pair)
    assert_same(gradients(model), expected)


# ---------------------------------------------------------------- soft


def soft_oracle(model: LocalWrapper, coefficient: float, *pair: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Greedy gradients of the units' losses, and those of the penalty written out by hand."""
    greedy = copy.deepcopy(model)
    greedy.sharing = Hard()  # which has no penalty
    losses, expected = oracle(greedy, *pair)
    for k in range(2):
        for name, weight in model.backbone[k + 1].named_parameters():  # type: ignore[index]
            copied = model.decoders[k].get_parameter(f"0.stage.{name}")
            difference = 2 * coefficient * (copied - weight).detach()
            expected[f"decoders.{k}.0.stage.{name}"] += difference
            expected[f"backbone.{k + 1}.{name}"] -= difference
    return losses, expected


@pytest.mark.parametrize("entry", ["step", "call"])
def test_soft_sharing_trains_private_copies_tied_by_the_penalty(entry: str) -> None:
    model = wrap(sharing=Soft(0.3))
    assert model.plan == Plan.windows(3, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        pair = views()
        losses, expected = soft_oracle(model, 0.3, *pair)
        optimizer.zero_grad()
        total = model.local_step(*pair).sum() if entry == "step" else model(*pair)
        if entry == "call":
            total.backward()
        torch.testing.assert_close(model.losses, losses)
        torch.testing.assert_close(total.detach(), losses.sum())
        assert_same(gradients(model), expected)
        assert model.penalty is not None
        assert (model.penalty.item() == 0) == (step == 0)
        optimizer.step()


def test_private_copies_equal_their_stages_at_the_start_and_share_no_storage() -> None:
    model = wrap(sharing=Soft())
    for k in range(2):
        for ours, theirs in zip(model.decoders[k][0].parameters(), model.backbone[k + 1].parameters(), strict=True):  # type: ignore[index, union-attr]
            assert torch.equal(ours, theirs)
            assert ours.data_ptr() != theirs.data_ptr()
    assert isinstance(model.decoders[2], MLPDecoder)


def test_the_penalty_is_the_squared_distance() -> None:
    model = wrap(sharing=Soft(0.5))
    with torch.no_grad():
        model.decoders[0][0].stage.bias += 2  # type: ignore[index, union-attr, operator]
    model.local_step(*views())
    assert model.penalty.item() == pytest.approx(0.5 * 4 * 4)  # type: ignore[union-attr]


def test_under_no_grad_the_penalty_is_reported_too() -> None:
    model = wrap(sharing=Soft())
    with torch.no_grad():
        model(*views())
    assert model.penalty.item() == 0  # type: ignore[union-attr]
    assert wrap().penalty is None


def test_grad_scale_scales_the_penalty_too() -> None:
    model = wrap(sharing=Soft(0.5))
    with torch.no_grad():
        model.decoders[0][0].stage.bias += 2  # type: ignore[index, union-attr, operator]
    pair = views()
    expected = {name: 8 * gradient for name, gradient in soft_oracle(model, 0.5, *pair)[1].items()}
    model.local_step(*pair, grad_scale=8.0)
    assert_same(gradients(model), expected)


def test_soft_sharing_of_a_resnet_with_the_default_decoder() -> None:
    specimen = ZOO["resnet18"]
    model = LocalWrapper(specimen.build(), specimen.stages, sharing=Soft(), example=specimen.views(2)[0])
    assert [d[1].channels if isinstance(d, nn.Sequential) else d.channels for d in model.decoders] == [
        128,
        256,
        512,
        512,
    ]  # type: ignore[union-attr, index]
    assert all(isinstance(d[1] if isinstance(d, nn.Sequential) else d, ConvMLPDecoder) for d in model.decoders)
    model.local_step(*specimen.views())
    assert model.penalty.item() == 0  # type: ignore[union-attr]


def test_a_frozen_stage_does_not_move_towards_its_copy() -> None:
    model = wrap(sharing=Soft(0.5))
    model.backbone[1].requires_grad_(False)  # type: ignore[index]
    with torch.no_grad():
        model.decoders[0][0].stage.bias += 2  # type: ignore[index, union-attr, operator]
    model.local_step(*views())
    assert not any(name.startswith("backbone.1") for name in gradients(model))


def test_a_negative_coefficient_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0; got -1"):
        Soft(-1)


def test_a_strategy_of_the_users_own_is_one_class() -> None:
    class Lowest(Sharing):
        """Every unit updates only its lowest stage, the last one all."""

        def plan(self, stages: int, overlap: int) -> Plan:
            units = [Unit(u.first, u.last, [u.first]) for u in super().plan(stages, overlap).units[:-1]]
            return Plan(stages, [*units, super().plan(stages, overlap).units[-1]])

    model = wrap(sharing=Lowest())
    pair = views()
    expected = oracle(copy.deepcopy(model), *pair)[1]
    model.local_step(*pair)
    assert_same(gradients(model), expected)
