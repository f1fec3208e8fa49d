"""Where the channels are is found by running: modules say it, whatever the shape looks like."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from zoo import conv

from locallearn import ConvMLPDecoder, LocalWrapper, MLPDecoder, Soft, TokenDecoder


class LastNorm(nn.LayerNorm):
    """Of maps with channels first, as timm's and torchvision's: what it is called does not say where they are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def maps(dims: int) -> nn.Sequential:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return nn.Sequential(kind(3, 6, 3, padding=1), nn.ReLU(), kind(6, 6, 3, padding=1))


def last() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 6))


@pytest.mark.parametrize(
    ("build", "shape", "decoder", "width"),
    [
        (partial(maps, 1), (2, 3, 6), ConvMLPDecoder, 6),
        (partial(maps, 2), (2, 3, 4, 6), ConvMLPDecoder, 6),
        (partial(maps, 3), (2, 3, 4, 4, 6), ConvMLPDecoder, 6),
        (last, (4, 3), MLPDecoder, 6),
        (last, (2, 6, 3), TokenDecoder, 6),
        (last, (2, 5, 3), TokenDecoder, 6),
        (last, (2, 6, 7, 3), ConvMLPDecoder, 6),
        (last, (2, 6, 6, 3), ConvMLPDecoder, 6),
        (last, (2, 6, 5, 4, 3), ConvMLPDecoder, 6),
        (last, (2, 6, 5, 4, 3, 3), MLPDecoder, 6),
    ],
)
@pytest.mark.parametrize("stages", [[0, 2], [1, 2]])
def test_the_decoder_fits(
    build: Callable[[], nn.Sequential], shape: tuple[int, ...], decoder: type[nn.Module], width: int, stages: list[int]
) -> None:
    model = LocalWrapper(build(), stages, 0, example=torch.rand(shape))
    for made in model.decoders:
        part = made if isinstance(made, decoder) else made[-1]  # type: ignore[index]
        assert isinstance(part, decoder)
        assert part.channels == width
    model.local_step(*torch.rand(2, 4, *shape[1:]).unbind())


@pytest.mark.parametrize("side", [4, 6])
def test_who_reads_an_outlet_knows(side: int) -> None:
    """Both kinds of maps have the same shape where the side is as long as there are channels."""
    net = nn.Sequential(conv(3, 6), LastNorm(6), conv(6, 6), Rearrange("n c h w -> n h w c"), nn.Linear(6, 6))
    model = LocalWrapper(net, [1, 3, 4], 0, example=torch.rand(2, 3, side, side))
    assert [isinstance(made, ConvMLPDecoder) for made in model.decoders] == [True, False, False]


def test_linear_layers_may_mix_along_positions() -> None:
    net = nn.Sequential(conv(3, 6), nn.Tanh(), nn.Linear(8, 5))
    model = LocalWrapper(net, [1, 2], 0, example=torch.rand(2, 3, 8, 8))
    assert model.decoders[0].channels == 6


def test_soft_sharing_reads_what_the_next_stage_makes() -> None:
    waves = nn.Sequential(*(nn.Conv1d(3 if k == 0 else 6, 6, 3) for k in range(3)))
    model = LocalWrapper(waves, [0, 1, 2], sharing=Soft(), example=torch.rand(2, 3, 20))
    assert all(any(isinstance(part, ConvMLPDecoder) for part in made.modules()) for made in model.decoders)


def test_what_is_said_can_be_overruled() -> None:
    model = LocalWrapper(maps(1), [0, 2], 0, example=torch.rand(2, 3, 6), channel_axis=-1)
    assert all(isinstance(made, TokenDecoder) for made in model.decoders)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_decoder_of_maps_in_any_dimension(dims: int) -> None:
    decoder, features = ConvMLPDecoder(4, dims=dims, out_features=5), torch.rand(2, 4, *[3] * dims)
    assert decoder(features).shape == (2, 5)
    assert decoder(features[..., :1]).shape == (2, 5)
    with pytest.raises(ValueError, match=r"reads \(N, 4, .*\); got \(2, 4\)"):
        decoder(features.flatten(2).mean(2))


def test_there_are_no_maps_of_four_dimensions() -> None:
    with pytest.raises(ValueError, match="1, 2 or 3 spatial axes; got dims=4"):
        ConvMLPDecoder(4, dims=4)


def test_another_word_than_auto_is_refused() -> None:
    wrong: Callable[[int], nn.Module] = "conv"  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"decoder is 'auto', a callable .*got 'conv'"):
        LocalWrapper(maps(2), [0, 2], decoder=wrong, example=torch.rand(2, 3, 4, 4))
