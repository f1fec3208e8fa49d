"""The rows of Tables 4 and 5 by name: the decoders that they are, the plans that they draw, what they refuse."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn", reason="the examples need the extra `examples`")

from backbones import ARCHITECTURES, Architecture
from inputs import images
from pretraining import methods
from tiny_pretrain import TINY, Tiny
from torch import nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock

from locallearn import LocalWrapper, Soft
from locallearn.diagnosis import Monitor

RESNET = ARCHITECTURES["resnet18"]


@pytest.fixture(autouse=True)
def float32() -> None:
    torch.set_default_dtype(torch.float32)


def tiny(decoder: str = "mlp", sharing: str = "hard", overlap: int = 1, loss: str = "nt-xent") -> LocalWrapper:
    torch.manual_seed(0)
    return methods.wrapped(Tiny(), TINY, 12, overlap=overlap, decoder=decoder, sharing=sharing, loss=loss)


def drawing(model: LocalWrapper) -> str:
    return "\n".join(line.rstrip() for line in str(model.plan).splitlines()[1:])


def kinds(decoder: nn.Module) -> dict[str, int]:
    """How many linear layers and convolutions, and how many times the map is halved."""
    parts = list(decoder.modules())
    linear = sum(isinstance(part, nn.Linear) for part in parts)
    return {
        "linear": linear,
        "3x3": sum(isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3) for part in parts),
        "halved": sum(isinstance(part, nn.AvgPool2d) for part in parts),
    }


@pytest.mark.parametrize(
    ("name", "linear", "convolutions", "halved"),
    [
        ("mlp", 2, 0, 0),
        ("mlp4", 4, 0, 0),
        ("conv-no-downsampling", 2, 1, 0),
        ("conv", 2, 1, 1),
        ("conv2", 2, 2, 1),
        ("conv+mlp4", 4, 1, 1),
    ],
)
def test_table_4s_decoders_have_its_layers(name: str, linear: int, convolutions: int, halved: int) -> None:
    for decoder in tiny(name).decoders:
        assert kinds(decoder) == {"linear": linear, "3x3": convolutions, "halved": halved}


@pytest.mark.parametrize(("name", "convolutions"), [("stage", [2, 3, 1]), ("network", [5, 3, 1])])
def test_a_decoder_repeats_the_stages_above_its_unit(name: str, convolutions: list[int]) -> None:
    """On stages of two, two and three convolutions; the top has nothing above it and gets the block's one."""
    model = tiny(name, overlap=0)
    assert [kinds(decoder)["3x3"] for decoder in model.decoders] == convolutions
    own = {id(weight) for weight in model.backbone.parameters()}
    assert not own & {id(weight) for weight in model.decoders.parameters()}
    model.local_step(*torch.randn(2, 4, 3, 12, 12))
    assert all(weight.grad is not None for weight in model.decoders.parameters())


def test_the_full_network_on_a_resnet_is_what_the_paper_says() -> None:
    """Each decoder is as deep as the encoder: with the stages below it, 8 residual blocks in all."""
    torch.manual_seed(0)
    model = methods.wrapped(resnet18(), RESNET, 32, overlap=0, decoder="network")
    counts = [sum(isinstance(part, BasicBlock) for part in decoder.modules()) for decoder in model.decoders]
    assert counts == [6, 4, 2, 0]


@pytest.mark.parametrize("sharing", ["soft-1e-3", "first-block"])
@pytest.mark.parametrize("decoder", ["stage", "network"])
def test_a_decoder_of_stages_needs_units_that_end_with_a_stage(decoder: str, sharing: str) -> None:
    with pytest.raises(images.DataError, match=f"--decoder {decoder} .* does not go with --sharing {sharing}"):
        tiny(decoder, sharing)


def test_a_decoder_of_stages_needs_stages_that_are_the_backbones_own_children() -> None:
    nested = Architecture(
        lambda size: nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))), ("0.0", "0.1")
    )
    with pytest.raises(images.DataError, match="--decoder stage and network repeat a backbone's own submodules"):
        methods.wrapped(nested.make(12), nested, 12, overlap=0, decoder="stage")


@pytest.mark.parametrize(
    ("sharing", "plan"),
    [
        ("hard", ["#  #", "   #  #"]),
        ("none", ["#", "   #", "      #"]),
        ("upper", ["#  .", "   #  #"]),
        ("soft-1e-3", ["#", "   #", "      #"]),
        ("first-block", ["#  #", "   #  #  #", "         #  #"]),
        ("first-2-blocks", ["#  #", "   #  #  #", "         #  #"]),
    ],
)
def test_table_5s_rows_draw_its_plans(sharing: str, plan: list[str]) -> None:
    model = tiny(sharing=sharing)
    assert drawing(model) == "\n".join(f"unit {k}        {row}" for k, row in enumerate(plan))
    assert model.local_step(*torch.randn(2, 4, 3, 12, 12)).isfinite().all()


def test_the_first_blocks_are_those_of_the_stages_that_are_shared() -> None:
    assert tiny(sharing="first-block").stages == ("low", "middle.0", "middle", "top.0", "top")
    assert methods.scope(resnet18(), RESNET.stages, 1, "first-block").stages == (
        *("layer1", "layer2.0", "layer2", "layer3.0", "layer3", "layer4.0", "layer4"),
    )


@pytest.mark.parametrize(("name", "coefficient"), [("soft-1e-4", 1e-4), ("soft-1e-3", 1e-3), ("soft-1e-2", 1e-2)])
def test_soft_sharing_has_the_coefficient_in_its_name(name: str, coefficient: float) -> None:
    sharing = tiny(sharing=name).sharing
    assert isinstance(sharing, Soft)
    assert sharing.coefficient == coefficient


@pytest.mark.parametrize(
    ("overlap", "sharing", "message"),
    [
        (3, "hard", "--overlap is between 0 and 2 for 3 stages, got 3"),
        (-1, "hard", "--overlap is between 0 and 2 for 3 stages, got -1"),
        (0, "upper", "--sharing upper is a way to share one stage, as loco does; it does not go with overlap 0"),
        (2, "soft-1e-3", "--sharing soft-1e-3 is .* does not go with overlap 2"),
        (0, "none", "--sharing none is .* does not go with overlap 0"),
    ],
)
def test_a_row_that_does_not_exist_is_refused(overlap: int, sharing: str, message: str) -> None:
    with pytest.raises(images.DataError, match=message):
        tiny(overlap=overlap, sharing=sharing)


def test_blocks_that_are_a_whole_stage_are_refused() -> None:
    with pytest.raises(images.DataError, match=r"--sharing first-2-blocks .*; layer2 has 2. .* is --sharing hard"):
        methods.scope(resnet18(), RESNET.stages, 1, "first-2-blocks")


def test_the_methods_overlap_as_the_paper_says() -> None:
    assert [methods.overlap_of(name, 4) for name in methods.METHODS] == [3, 0, 1]


@pytest.mark.parametrize("decoder", [name for name in (*methods.DECODERS, *methods.DEPTHS) if name != "tokens"])
def test_decoders_begin_alike_in_all_methods_and_leave_the_random_numbers_alone(decoder: str) -> None:
    wrappers = [tiny(decoder, overlap=overlap) for overlap in (0, 1, 2)]
    state = torch.get_rng_state()
    starts = {unit.last: d for unit, d in zip(wrappers[0].plan.units, wrappers[0].decoders, strict=True)}
    for model in wrappers[1:]:
        for unit, other in zip(model.plan.units, model.decoders, strict=True):
            for name, value in other.state_dict().items():
                assert torch.equal(value, starts[unit.last].state_dict()[name]), (unit, name)
    tiny(decoder)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_seed_makes_other_decoders() -> None:
    one, other = (methods.wrapped(Tiny(), TINY, 12, overlap=1, decoder="mlp", seed=seed) for seed in (0, 1))
    assert not torch.equal(one.decoders[0].mlp[0].weight, other.decoders[0].mlp[0].weight)


@pytest.mark.parametrize("loss", methods.LOSSES)
def test_every_loss_tells_its_accuracy_and_spread(loss: str) -> None:
    model = tiny(loss=loss)
    labels = torch.tensor([0, 1, 0, 1]) if loss in methods.LABELLED else None
    with Monitor(model, every=1) as monitor:
        losses = model.local_step(*torch.randn(2, 4, 3, 12, 12), targets=labels)
        seen = monitor.measured()
    assert losses.isfinite().all()
    assert ((seen["top1"] >= 0) & (seen["top1"] <= 1)).all()
    assert ((seen["spread"] > 0) & (seen["spread"] <= 1)).all()


def test_the_losses_are_those_of_their_names() -> None:
    alike = torch.ones(4, 8)
    at_random = {name: methods.LOSSES[name](0.1)(alike, alike) for name in ("nt-xent", "one-way", "two-way")}
    expected = {
        "nt-xent": torch.tensor(7.0).log(),
        "one-way": torch.tensor(4.0).log(),
        "two-way": torch.tensor(4.0).log(),
    }
    for name, value in at_random.items():
        torch.testing.assert_close(value, expected[name])
