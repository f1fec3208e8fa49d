"""``stages="auto"`` and the widths of outlets: right, or refused with what to say; never silently something else."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from zoo import conv

from locallearn import ConvMLPDecoder, LocalWrapper, MLPDecoder, Plan, TokenDecoder, memory_report, plan_stages
from locallearn._fitting.channels import agreed_axis

# ---------------------------------------------------------------- nothing that is trained is left out


@pytest.mark.parametrize("size", [16, 32, 64])
def test_layers_that_see_a_single_position_are_trained_too(size: int) -> None:
    net, pair = models.resnet18(), torch.rand(2, 4, 3, size, size).unbind()
    chosen = plan_stages(net, pair[0])
    assert chosen.stages[-1] == "layer4"
    assert chosen.left_out == ("fc",)
    assert "trained: 11,176,512 weights; left out: fc" in str(chosen)
    LocalWrapper(net, chosen.stages, example=pair[0]).local_step(*pair)
    assert {name for name, weight in net.named_parameters() if weight.grad is None} == {"fc.weight", "fc.bias"}


def test_a_chain_that_has_shrunk_to_one_position_ends_with_its_activation() -> None:
    net = nn.Sequential(*(part for k in range(4) for part in (conv(3 if k == 0 else 4, 4, 2), nn.ReLU())))
    chosen = plan_stages(net.append(nn.AdaptiveAvgPool2d(1)), torch.rand(2, 3, 8, 8), 3)
    assert chosen.pieces[-1][-1].shape == (2, 4, 1, 1)
    assert chosen.left_out == ()


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


@pytest.mark.parametrize("stages", ["auto", ["features.1", "features.3", "features.5", "features.7"]])
def test_maps_with_channels_last_need_not_be_square(stages: Any) -> None:
    model = LocalWrapper(models.swin_t(), stages, example=torch.rand(2, 3, 64, 96))
    at = [dict(model.backbone.named_modules())[stage] for stage in model.stages]
    outlets: list[Tensor] = []
    for end in at:
        end.register_forward_hook(lambda module, args, output: outlets.append(output))
    model.backbone(torch.rand(2, 3, 64, 96))
    widths = [max(outlet.shape[1], outlet.shape[-1]) for outlet in outlets[1:]]
    read = [part.channels for part in model.decoders.modules() if isinstance(part, ConvMLPDecoder)]
    assert read == widths


class Silent(nn.Module):
    """Multiplies by a weight of its own: no module says where the channels are."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(after, before))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ncl,dc->ndl", x, self.weight)


def test_a_shape_that_the_weights_contradict_is_refused_where_no_module_says() -> None:
    waves = nn.Sequential(Silent(3, 4), Silent(4, 6))
    for stages in ([0, 1], "auto"):
        with pytest.raises(ValueError, match=r"Say channel_axis=1 \(or -1\)"):
            LocalWrapper(waves, stages, 0, example=torch.rand(2, 3, 29), plan=Plan.windows(2, 0))  # type: ignore[arg-type]
    waves.requires_grad_(False)
    with pytest.raises(ValueError, match="Say channel_axis=1"):
        LocalWrapper(waves, [0, 1], example=torch.rand(2, 3, 29))
    LocalWrapper(waves.requires_grad_(), [0, 1], example=torch.rand(2, 3, 29), channel_axis=1)


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


@pytest.mark.parametrize("where", ["cache", "tuple", "method", "dict"])
def test_what_the_analysis_puts_into_a_cache_is_no_fake(where: str) -> None:
    net, images = with_positions(where), torch.rand(4, 3, 8, 8)
    plan_stages(net, images, 2)
    assert type(net(images)) is Tensor


def test_a_report_takes_its_fakes_out_of_a_dictionary() -> None:
    net, images = with_positions("dict"), torch.rand(4, 3, 8, 8)
    model = LocalWrapper(net, [1, 3], example=torch.rand(4, 3, 6, 6))
    memory_report(model, images, images)
    assert {key: type(kept) for key, kept in KEPT.items()} == {(6, 6): Tensor}
    model.local_step(images, images.flip(3))


class Global(nn.Module):
    """Keeps what it computed last in a class."""

    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        Global.last = self.conv(x).detach()
        return self.conv(x)  # type: ignore[no-any-return]


def test_another_place_that_keeps_a_fake_tensor_is_named_and_refused() -> None:
    model = LocalWrapper(nn.Sequential(conv(3, 4), Global()), [0, 1], example=torch.rand(4, 3, 8, 8))
    with pytest.raises(RuntimeError, match=r"the class test_automatic.Global has kept a tensor .*count a real step"):
        memory_report(model, *torch.rand(2, 4, 3, 8, 8))
