"""The paper's backbones are the paper's: sizes, parameters, and Table 6 column by column; and all can be cut by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same, gradients, oracle
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import resnet18, resnet50, shufflenet_v2_x0_5

from locallearn import LocalWrapper, MLPDecoder, Plan
from locallearn.models import (
    PResNet,
    presnet50,
    presnet_small,
    resnet_cifar,
    resnet_cifar_stages,
    shufflenet_v2_50,
    small_image_stem,
)
from locallearn.models.progressive import Resize

pytest.importorskip("rich", reason="the examples need the extra `examples`")
from backbones import ARCHITECTURES, StageFeatures
from counting.paper_counts import StageCount, paper_counts, shares

RESNET = ("layer1", "layer2", "layer3", "layer4")
PRESNET = (*RESNET, "layer5", "layer6")
SHUFFLENET = ("stage2", "stage3", "stage4", "conv6")


@pytest.fixture(autouse=True)
def float32() -> None:
    torch.set_default_dtype(torch.float32)


@cache
def counts(make: Callable[[], nn.Module], stages: tuple[str, ...], size: int = 224) -> list[StageCount]:
    with FakeTensorMode():
        return paper_counts(make(), stages, torch.zeros(1, 3, size, size))


def giga(make: Callable[[], nn.Module], stages: tuple[str, ...]) -> float:
    return sum(stage.flops for stage in counts(make, stages)) / 1e9


def memory_shares(make: Callable[[], nn.Module], stages: tuple[str, ...], size: int = 224) -> list[float]:
    return shares([stage.memory for stage in counts(make, stages, size)])


def flops_shares(make: Callable[[], nn.Module], stages: tuple[str, ...]) -> list[float]:
    return shares([stage.flops for stage in counts(make, stages)])


def macs_of_convolutions(backbone: nn.Module, size: int = 224) -> int:
    """BatchNorm left out."""
    total = 0

    def add(module: nn.Conv2d, args: object, output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(add)
    backbone(torch.zeros(1, 3, size, size))
    return total


def maps_of(backbone: nn.Module, stages: tuple[str, ...], size: int) -> list[tuple[int, int]]:
    """Channels and side of each stage's outlet."""
    shapes = []
    for stage in stages:
        backbone.get_submodule(stage).register_forward_hook(
            lambda module, args, out: shapes.append(tuple(out.shape[1:3]))
        )
    backbone(torch.zeros(2, 3, size, size))
    return shapes


# ------------------------------------------------------------------------------------------------------- PResNet-50


def test_presnet50_reproduces_the_flops_of_table_6() -> None:
    assert flops_shares(presnet50, PRESNET) == pytest.approx([13.50, 14.63, 14.77, 16.62, 20.45, 20.04], abs=0.05)
    assert giga(presnet50, PRESNET) == pytest.approx(4.16, abs=0.005)


def test_presnet50_reproduces_the_memory_of_table_6_with_128_channels_in_its_third_stage() -> None:
    paper = [15.46, 10.96, 19.48, 17.31, 19.48, 17.31]
    memory = [stage.memory for stage in counts(presnet50, PRESNET)]
    assert shares(memory) != pytest.approx(paper, abs=0.3)
    memory[2] = memory[2] * 128 // 144
    assert shares(memory) == pytest.approx(paper, abs=0.01)


def test_table_8_to_the_letter_has_fewer_flops() -> None:
    with FakeTensorMode():
        assert macs_of_convolutions(presnet50(literal=True)) / 1e9 == pytest.approx(3.79, abs=0.005)
        assert macs_of_convolutions(presnet50()) / 1e9 == pytest.approx(4.14, abs=0.005)


@pytest.mark.parametrize("literal", [False, True])
def test_presnet50_has_the_maps_of_table_8(literal: bool) -> None:
    with FakeTensorMode():
        backbone = presnet50(literal=literal)
        assert maps_of(backbone, PRESNET, 224) == [(56, 56), (96, 36), (576, 24), (1024, 16), (2048, 12), (4096, 8)]
        assert maps_of(backbone.conv1, ("",), 224) == [(32, 112)]
    assert [len(backbone.get_submodule(stage)) for stage in PRESNET] == [3] * 6


def test_groups_of_presnet50_follow_table_8() -> None:
    with FakeTensorMode():
        ours, letter = presnet50(), presnet50(literal=True)

    def groups(backbone: PResNet, stage: str) -> list[list[int]]:
        return [[block.conv1.groups, block.conv2.groups, block.conv3.groups] for block in backbone.get_submodule(stage)]

    for stage, n in (("layer4", 2), ("layer5", 16), ("layer6", 128)):
        assert groups(letter, stage) == [[n, n, 1], [n, n, n], [n, n, n]]
    for stage, n in (("layer4", 2), ("layer5", 16)):
        assert groups(ours, stage) == [[n, n, 1]] * 3
    assert groups(ours, "layer6") == groups(letter, "layer6")


def test_resizing_is_torchs_bilinear_interpolation_and_rounds() -> None:
    maps = torch.rand(2, 3, 56, 14)
    expected = nn.functional.interpolate(maps, size=(36, 9), mode="bilinear")
    torch.testing.assert_close(Resize(9, 14)(maps), expected, rtol=0, atol=0)
    assert Resize(1, 1)(maps) is maps
    assert [Resize(3, 4)(torch.zeros(1, 1, side, side)).shape[-1] for side in (1, 2, 3, 5, 6)] == [1, 2, 2, 4, 5]


def test_a_basic_block_is_its_formula_in_plain_torch() -> None:
    block = presnet50(zero_init_residual=False).layer2[0].eval()  # type: ignore[index, union-attr]
    x = torch.rand(2, 56, 56, 56)
    small = nn.functional.interpolate(x, size=36, mode="bilinear")
    branch = block.bn2(block.conv2(block.bn1(block.conv1(small)).relu()))
    torch.testing.assert_close(block(x), (branch + block.downsample(small)).relu())


def test_a_bottleneck_is_its_formula_in_plain_torch() -> None:
    block = presnet50(zero_init_residual=False).layer3[0].eval()  # type: ignore[index, union-attr]
    x = torch.rand(2, 96, 36, 36)
    small = partial(nn.functional.interpolate, size=24, mode="bilinear")
    branch = block.bn2(block.conv2(block.bn1(small(block.conv1(x))).relu())).relu()
    torch.testing.assert_close(block(x), (block.bn3(block.conv3(branch)) + block.downsample(small(x))).relu())


def test_residual_branches_start_at_zero_if_asked() -> None:
    x = torch.rand(2, 12, 4, 4)
    assert torch.equal(presnet_small(32, blocks=2).layer2[1].eval()(x), x)  # type: ignore[index, operator, union-attr]
    plain = presnet_small(32, blocks=2, zero_init_residual=False)
    assert not torch.equal(plain.layer2[1].eval()(x), x)  # type: ignore[index, operator, union-attr]


# ------------------------------------------------------------------------------------------------------- small images


@pytest.mark.parametrize(
    ("size", "sides"),
    [(16, [12, 8, 6, 4, 3, 2]), (32, [24, 16, 12, 8, 6, 4]), (96, [36, 24, 18, 12, 9, 6])],
)
def test_presnet_small_shrinks_its_maps_progressively(size: int, sides: list[int]) -> None:
    assert [side for _, side in maps_of(presnet_small(size), PRESNET, size)] == sides


@pytest.mark.parametrize("width", [8, 16, 32])
@pytest.mark.parametrize("size", [16, 32, 96])
def test_presnet_small_keeps_the_balance_of_memory_of_presnet50(size: int, width: int) -> None:
    small = memory_shares(partial(presnet_small, size, width=width), PRESNET, size)
    assert small == pytest.approx(memory_shares(presnet50, PRESNET), abs=1)


def test_impossible_small_nets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiple of 4, so that .* got 6"):
        presnet_small(32, width=6)
    with pytest.raises(ValueError, match="got image_size=4"):
        presnet_small(4)


@pytest.mark.parametrize("make", [resnet18, shufflenet_v2_x0_5, shufflenet_v2_50, presnet50])
def test_the_stem_for_small_images_keeps_their_size(make: Callable[[], nn.Module]) -> None:
    backbone = small_image_stem(make())
    first = "layer1" if hasattr(backbone, "layer1") else "maxpool"
    assert [side for _, side in maps_of(backbone.eval(), (first,), 32)] == [32]


def test_a_backbone_without_such_a_stem_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Sequential has \['0'\]. Build it for small images yourself"):
        small_image_stem(nn.Sequential(nn.Conv2d(3, 8, 7)))


# ------------------------------------------------------------------------------------------------------- ResNets of 6n + 2

# Table 2 of InfoPro was made with these cuts, as [layer, block] in its code
INFOPRO = {
    2: [[2, 1]],
    4: [[1, 2], [2, 1], [3, 0]],
    8: [[1, 0], [1, 2], [1, 4], [2, 1], [2, 3], [3, 0], [3, 2]],
}


@pytest.mark.parametrize(("depth", "weights"), [(20, 269_722), (32, 464_154), (110, 1_727_962)])
def test_a_resnet_of_6n_plus_2_layers_has_the_size_of_its_paper(depth: int, weights: int) -> None:
    backbone = resnet_cifar(depth)
    assert sum(weight.numel() for weight in backbone.parameters()) == weights  # 0.27M, 0.46M, 1.7M
    layers = [module for module in backbone.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth
    assert maps_of(resnet_cifar(8), RESNET[:3], 32) == [(16, 32), (32, 16), (64, 8)]


def test_its_shortcut_takes_every_second_pixel_and_fills_up_with_zeros() -> None:
    block = resnet_cifar(8).layer2[0].eval()  # type: ignore[index, union-attr]
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 32, 32)
    y = block(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert y[:, 16:].eq(0).all()


@pytest.mark.parametrize("count", INFOPRO)
def test_resnet_32_is_cut_as_infopro_cuts_it(count: int) -> None:
    ours = [stage.removeprefix("layer").split(".") for stage in resnet_cifar_stages(32, count)]
    assert [[int(number) for number in stage] for stage in ours] == [*INFOPRO[count], [3, 4]]


def test_every_block_can_be_a_stage() -> None:
    blocks = tuple(f"layer{layer}.{block}" for layer in (1, 2, 3) for block in range(5))
    assert resnet_cifar_stages(32, 15) == blocks
    assert resnet_cifar_stages(32, 16) == ("relu", *blocks)
    assert resnet_cifar_stages(32, 1) == ("layer3.4",)
    assert resnet_cifar_stages(110, 4) == ("layer1.11", "layer2.7", "layer3.3", "layer3.17")


@pytest.mark.parametrize("count", [4, 9, 10])
def test_its_stages_are_trained_with_autograds_own_gradients(count: int) -> None:
    torch.set_default_dtype(torch.float64)
    model = LocalWrapper(
        resnet_cifar(20, width=4),
        resnet_cifar_stages(20, count),
        plan=Plan.hierarchical(count),
        decoder=partial(MLPDecoder, out_features=10),
        loss=F.cross_entropy,
        example=torch.zeros(2, 3, 16, 16),
    )
    images, labels = torch.rand(4, 3, 16, 16), torch.arange(4)
    losses, expected = oracle(model, images, targets=labels)
    torch.testing.assert_close(model.local_step(images, targets=labels), losses)
    assert_same(gradients(model), expected)
    trained = {name for name, weight in model.backbone.named_parameters() if weight.grad is not None}
    assert trained == {name for name, _ in model.backbone.named_parameters()} - {"fc.weight", "fc.bias"}


def test_resnets_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"6n \+ 2: 8, 14, .*; got 18"):
        resnet_cifar(18)
    with pytest.raises(ValueError, match="a stem and 9 blocks: 1 to 10 stages; got 11"):
        resnet_cifar_stages(20, 11)


# ------------------------------------------------------------------------------------------------------- the others


def test_shufflenet_v2_50_has_the_size_of_its_paper() -> None:
    with FakeTensorMode():
        backbone = shufflenet_v2_50()
        assert macs_of_convolutions(backbone) / 1e9 == pytest.approx(2.3, abs=0.05)
        outlets = maps_of(backbone, ("conv1", "maxpool", *SHUFFLENET), 224)
    assert sum(weight.numel() for weight in backbone.parameters()) / 1e6 == pytest.approx(16.5, abs=0.1)
    assert outlets == [(64, 112), (64, 56), (244, 56), (488, 28), (976, 14), (2048, 7)]
    assert [len(backbone.get_submodule(f"stage{k}")) for k in (2, 3, 4, 5)] == [3, 4, 6, 3]


def test_a_shuffle_unit_passes_half_of_its_channels_on_and_alternates_them() -> None:
    unit = shufflenet_v2_50().stage2[1].eval()  # type: ignore[index, union-attr]
    x = torch.rand(2, 244, 4, 4)
    y = unit(x)
    torch.testing.assert_close(y[:, ::2], x[:, :122], rtol=0, atol=0)
    torch.testing.assert_close(y[:, 1::2], unit.branch(x[:, 122:]))


def test_resnet50_reproduces_table_6() -> None:
    assert memory_shares(resnet50, RESNET) == pytest.approx([43.64, 29.09, 21.82, 5.45], abs=0.01)
    assert flops_shares(resnet50, RESNET) == pytest.approx([19.39, 25.09, 35.80, 19.73], abs=0.1)
    assert giga(resnet50, RESNET) == pytest.approx(4.1, abs=0.05)


# ------------------------------------------------------------------------------------------------------- cuts


@pytest.mark.parametrize(
    ("make", "stages"),
    [(resnet50, RESNET), (presnet50, PRESNET), (shufflenet_v2_50, SHUFFLENET), (presnet_small, PRESNET)],
)
def test_backbones_are_wrapped_by_name(make: Callable[[], nn.Module], stages: tuple[str, ...]) -> None:
    with FakeTensorMode():
        model = LocalWrapper(make(), list(stages), overlap=1)
        views = torch.zeros(2, 2, 3, 64, 64).unbind()
        assert model.local_step(*views).shape == (len(stages) - 1,)
    trained = {name for name, weight in model.backbone.named_parameters() if weight.grad is not None}
    assert trained == {name for name, _ in model.backbone.named_parameters()} - {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_of_the_examples_end_with_the_encoders_vector(name: str, size: int) -> None:
    architecture = ARCHITECTURES[name]
    with FakeTensorMode():
        backbone = architecture.make(size).eval()
        features = StageFeatures(backbone, architecture.stages)(torch.zeros(2, 3, size, size))
    assert len(features) == len(architecture.stages)
    assert features[-1].shape == (2, backbone.fc.in_features)  # type: ignore[union-attr]
