"""``stages="auto"`` and the widths of outlets: right, or refused with what to say; never silently something else."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from zoo import conv

from locallearn import LocalWrapper, MLPDecoder, Plan, TokenDecoder, memory_report, plan_stages
from locallearn._fitting.channels import agreed_axis

# ---------------------------------------------------------------- nothing that is trained is left out


@pytest.mark.parametrize(
    ("size", "lost"), [(32, r"\['layer4.0', 'layer4'\], 8,393,728 weights"), (16, r"\['layer3.0', .*'layer4'\]")]
)
def test_layers_behind_the_last_map_are_refused(size: int, lost: str) -> None:
    with pytest.raises(ValueError, match=rf"{lost}.*name the stages yourself: stages=\[..., 'layer4'\]"):
        plan_stages(models.resnet18(), torch.zeros(2, 3, size, size))


def test_stages_named_as_the_message_says_train_all_of_them() -> None:
    net = models.resnet18()
    model = LocalWrapper(
        net, ["layer1", "layer2", "layer3", "layer4"], decoder=MLPDecoder, example=torch.rand(2, 3, 32, 32)
    )
    model.local_step(*torch.rand(2, 4, 3, 32, 32))
    assert {name for name, weight in net.named_parameters() if weight.grad is None} == {"fc.weight", "fc.bias"}


def test_frozen_layers_behind_the_last_map_are_left_out() -> None:
    net = models.resnet18()
    net.layer4.requires_grad_(False)
    assert plan_stages(net, torch.zeros(2, 3, 32, 32), decoder=MLPDecoder).stages[-1] == "layer3"


@pytest.mark.parametrize(
    ("build", "last"),
    [
        (models.resnet18, "layer4"),
        (models.vgg11, "avgpool"),
        (models.mobilenet_v3_small, "features"),  # the last convolution and the pooling are one run of simple layers
    ],
)
def test_a_head_is_left_out(build: Callable[[], nn.Module], last: str) -> None:
    assert plan_stages(build(), torch.zeros(2, 3, 64, 64), decoder=MLPDecoder).stages[-1] == last


# ---------------------------------------------------------------- the channels are where the weights say


def test_maps_with_channels_last_that_are_not_square_are_refused() -> None:
    swin, stages = models.swin_t(), ["features.1", "features.3", "features.5", "features.7"]
    example = torch.rand(2, 3, 64, 96)
    for stages_ in (stages, "auto"):
        with pytest.raises(ValueError, match=r"tells axis 1, of size \d+, .*LocalWrapper\(..., channel_axis=-1\)"):
            LocalWrapper(swin, stages_, example=example)  # type: ignore[arg-type]
    model = LocalWrapper(swin, stages, example=example, channel_axis=-1)
    assert [decoder[1].channels for decoder in model.decoders] == [192, 384, 768]  # type: ignore[index, union-attr]


def test_a_convolution_in_one_dimension_is_refused() -> None:
    waves = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Conv1d(4, 6, 3))
    with pytest.raises(ValueError, match=r"shape \(2, 6, 29\) .* Say channel_axis=1 \(or -1\)"):
        LocalWrapper(waves, [0, 1], decoder=MLPDecoder, example=torch.rand(2, 1, 33))
    waves.requires_grad_(False)
    with pytest.raises(ValueError, match="Say channel_axis=1"):
        LocalWrapper(waves, [0, 1], decoder=MLPDecoder, example=torch.rand(2, 1, 33))


@pytest.mark.parametrize(
    ("shape", "weights", "axis"),
    [
        ((2, 16, 8, 8), [(8, 3, 3, 3), (8,)], 1),  # two halves of 8 channels, and a map of 8 positions
        ((2, 8, 12, 192), [(192, 96)], None),
        ((2, 8, 8, 5), [(8, 3, 3, 3)], None),
        ((2, 7, 7, 96), [(96,)], -1),
        ((2, 197, 192), [(192,)], -1),
        ((2, 4, 14, 14, 96), [(96,)], None),
        ((2, 96, 4, 14, 14), [(96,)], 1),
        ((2, 9, 5), [], -1),
        ((2, 5), [(2, 2)], 1),
    ],
)
def test_the_axis_of_the_channels(shape: tuple[int, ...], weights: list[tuple[int, ...]], axis: int | None) -> None:
    sizes = [torch.Size(size) for size in weights]
    if axis is None:
        with pytest.raises(ValueError, match="channel_axis="):
            agreed_axis(torch.zeros(shape), sizes)
    else:
        assert agreed_axis(torch.zeros(shape), sizes) == axis


# ---------------------------------------------------------------- the batch comes first


class BatchSecond(nn.Module):
    """Tokens first, as in CLIP's transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).transpose(0, 1)  # (T, N, C)
        return self.b(self.a(tokens)).transpose(0, 1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("tokens", [3, 4])
def test_an_outlet_whose_first_axis_is_another_is_refused(tokens: int) -> None:
    with pytest.raises(
        ValueError, match=rf"after 'a', which returned shape \({tokens}, 2, 8\) for a batch of 2.*batch first"
    ):
        LocalWrapper(BatchSecond(), ["a", "b"], decoder=MLPDecoder, example=torch.rand(2, tokens, 5))


def test_as_many_tokens_as_the_example_has_inputs_are_refused_in_the_step() -> None:
    model = LocalWrapper(BatchSecond(), ["a", "b"], 0, decoder=TokenDecoder, example=torch.rand(4, 4, 5))
    with pytest.raises(ValueError, match=r"which returned shape \(4, 12, 8\) for a batch of 12"):
        model.local_step(*torch.rand(2, 6, 4, 5))


class Folded(nn.Module):
    """The crops of an image become a batch of their own."""

    def __init__(self, crops: int) -> None:
        super().__init__()
        self.crops, self.a, self.b = crops, conv(3, 4), conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.repeat_interleave(self.crops, 0)))  # type: ignore[no-any-return]


def test_an_axis_folded_into_the_batch_is_none_of_them() -> None:
    model = LocalWrapper(Folded(3), ["a", "b"], decoder=MLPDecoder, example=torch.rand(2, 3, 8, 8))
    assert model.local_step(*torch.rand(2, 4, 3, 8, 8)).isfinite().all()


class Merged(nn.Module):
    """Two inputs become one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 4), conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x[::2] + x[1::2]))  # type: ignore[no-any-return]


def test_fewer_rows_than_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"returned shape \(2, 4, 8, 8\) for a batch of 4"):
        LocalWrapper(Merged(), ["a", "b"], decoder=MLPDecoder, example=torch.rand(4, 3, 8, 8))


def test_an_outlet_without_channels_is_refused() -> None:
    net = nn.Sequential(nn.Linear(5, 1), nn.Flatten(0), nn.Unflatten(0, (-1, 1)), nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"after '1', which returned shape \(2,\)"):
        LocalWrapper(net, [1, 3], decoder=MLPDecoder, example=torch.rand(2, 5))


def test_integers_are_refused() -> None:
    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.long()

    class Floats(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.get_default_dtype())

    net = nn.Sequential(conv(3, 4), Rounded(), Floats(), conv(4, 4))
    with pytest.raises(TypeError, match=r"stage 0 ends after '1', which returned torch.int64; no gradient"):
        LocalWrapper(net, [1, 3], decoder=MLPDecoder, example=torch.rand(2, 3, 8, 8))


# ---------------------------------------------------------------- nothing is left of the analysis

KEPT: dict[tuple[int, int], Tensor] = {}


def in_a_dict(height: int, width: int) -> Tensor:
    if (height, width) not in KEPT:
        KEPT[height, width] = torch.ones(height, width)
    return KEPT[height, width]


@lru_cache(maxsize=8)
def in_a_cache(height: int, width: int) -> Tensor:
    return torch.ones(height, width)


@cache
def in_a_tuple(height: int, width: int) -> tuple[tuple[Tensor, int], int]:
    return (torch.ones(height, width), 1), 2


class Positions(nn.Module):
    """Adds what depends on the size of the map alone, and remembers it as a transformer's positions are."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.conv = where, conv(4, 4)

    @lru_cache(maxsize=8)  # noqa: B019 - as transformers does
    def in_a_method(self, height: int, width: int) -> Tensor:
        return torch.ones(height, width)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        known = {"method": self.in_a_method, "dict": in_a_dict, "cache": in_a_cache}.get(self.where)
        positions = in_a_tuple(height, width)[0][0] if known is None else known(height, width)
        return self.conv(x) + positions  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def empty_caches() -> None:
    KEPT.clear()
    for cached in (in_a_cache, in_a_tuple, Positions.in_a_method):
        cached.cache_clear()


def with_positions(where: str) -> nn.Sequential:
    return nn.Sequential(conv(3, 4), *(Positions(where) for _ in range(3)))


@pytest.mark.parametrize("where", ["cache", "tuple", "method"])
@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("by", ["auto", "report"])
def test_a_cache_that_the_forward_fills_is_emptied(where: str, ran_before: bool, by: str) -> None:
    net, images = with_positions(where), torch.rand(4, 3, 8, 8)
    if ran_before:
        net(images)
    if by == "auto":
        model = LocalWrapper(net, "auto", plan=Plan.windows(2, 1), decoder=MLPDecoder, example=images)
    else:
        model = LocalWrapper(net, [1, 3], decoder=MLPDecoder, example=images)
        memory_report(model, images, images)
    assert type(net(images)) is Tensor
    model.local_step(images, images.flip(3))
    assert type(model.losses) is Tensor


def test_another_place_that_keeps_a_fake_tensor_is_named_and_refused() -> None:
    net, images = with_positions("dict"), torch.rand(4, 3, 8, 8)
    with pytest.raises(RuntimeError, match=r"the module 'test_automatic' has kept a tensor .*Empty that cache"):
        LocalWrapper(net, "auto", plan=Plan.windows(2, 1), decoder=MLPDecoder, example=images)
    KEPT.clear()
    LocalWrapper(net, [1, 3], decoder=MLPDecoder, example=images).local_step(images, images.flip(3))
    LocalWrapper(net, "auto", plan=Plan.windows(2, 1), decoder=MLPDecoder, example=images)
