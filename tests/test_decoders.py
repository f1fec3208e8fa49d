"""Decoders of every row of Table 4, and for tokens."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from locallearn import ConvMLPDecoder, MLPDecoder, PlainConvDecoder, TokenDecoder


def linear_sizes(decoder: nn.Module) -> list[tuple[int, int]]:
    return [(m.in_features, m.out_features) for m in decoder.mlp.modules() if isinstance(m, nn.Linear)]  # type: ignore[union-attr]


def test_default_is_the_papers_decoder() -> None:
    decoder = ConvMLPDecoder(64)
    (block,) = decoder.blocks
    convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size) for c in convolutions] == [
        (64, 16, (1, 1)),
        (16, 16, (3, 3)),
        (16, 64, (1, 1)),
    ]
    assert block(torch.rand(2, 64, 8, 8)).shape == (2, 64, 4, 4)
    assert linear_sizes(decoder) == [(64, 64), (64, 128)]


@pytest.mark.parametrize(
    ("decoder", "blocks", "size", "layers"),
    [
        (MLPDecoder, 0, None, 2),
        (partial(ConvMLPDecoder, stride=1), 1, 8, 2),
        (ConvMLPDecoder, 1, 4, 2),
        (partial(ConvMLPDecoder, blocks=2), 2, 4, 2),
        (partial(ConvMLPDecoder, blocks=4, widths=128), 4, 4, 2),
        (partial(ConvMLPDecoder, blocks=(4, 6, 3), widths=(128, 256, 512)), 13, 1, 2),
        (partial(MLPDecoder, depth=4), 0, None, 4),
        (partial(ConvMLPDecoder, depth=4), 1, 4, 4),
    ],
    ids=[
        "none",
        "1 block, no ds",
        "1 block",
        "2 blocks",
        "1 stage",
        "full network",
        "2-layer MLP",
        "LoCo + 2-layer MLP",
    ],
)
def test_rows_of_table_4(decoder, blocks: int, size: int | None, layers: int) -> None:  # type: ignore[no-untyped-def]
    built = decoder(64)
    maps = torch.rand(2, 64, 8, 8)
    assert built(maps).shape == (2, 128)
    assert len(linear_sizes(built)) == layers
    if size is not None:
        assert len(built.blocks) == blocks
        assert built.blocks(maps).shape[2:] == (size, size)


def test_widths_can_be_set() -> None:
    decoder = ConvMLPDecoder(64, widths=96, bottleneck=8, hidden=32, out_features=10)
    assert decoder.blocks[0].branch[0].out_channels == 8  # type: ignore[index, union-attr]
    assert linear_sizes(decoder) == [(96, 32), (32, 10)]


def test_mlp_decoder_pools_any_number_of_axes() -> None:
    decoder = MLPDecoder(6)
    maps = torch.rand(3, 6, 4, 5)
    torch.testing.assert_close(decoder(maps), decoder(maps.mean((2, 3))))
    torch.testing.assert_close(decoder(maps.flatten(2)), decoder(maps))


def test_a_grid_keeps_where_something_is() -> None:
    decoder = MLPDecoder(6, grid=2)
    assert linear_sizes(decoder) == [(24, 6), (6, 128)]
    maps = torch.rand(3, 6, 8, 4)
    quarters = torch.stack([maps[:, :, y : y + 4, x : x + 2].mean((2, 3)) for y in (0, 4) for x in (0, 2)], dim=2)
    torch.testing.assert_close(decoder(maps), decoder.mlp(quarters.flatten(1)))
    assert not torch.allclose(decoder(maps), decoder(maps.flip(3)))
    whole = MLPDecoder(6)
    torch.testing.assert_close(whole(maps), whole(maps.flip(3)))


@pytest.mark.parametrize(("convolutions", "depth"), [(1, 1), (1, 2), (1, 3), (2, 2)])
def test_heads_have_as_many_convolutions_and_layers_as_their_names_say(convolutions: int, depth: int) -> None:
    decoder = PlainConvDecoder(16, convolutions=convolutions, depth=depth, out_features=10)
    maps = torch.rand(2, 16, 8, 8)
    assert decoder(maps).shape == (2, 10)
    assert decoder.convolutions(maps).shape == (2, 32, 4, 4)
    assert sum(isinstance(m, nn.Conv2d) for m in decoder.modules()) == convolutions
    assert linear_sizes(decoder) == [(32, 10)] if depth == 1 else [(32, 128), *[(128, 128)] * (depth - 2), (128, 10)]


def test_infopros_head_of_the_widest_layer_keeps_its_width_and_size() -> None:
    decoder = PlainConvDecoder(64, width=64, stride=1)
    assert decoder.convolutions(torch.rand(2, 64, 8, 8)).shape == (2, 64, 8, 8)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_block_takes_maps_of_any_size(size: int) -> None:
    assert ConvMLPDecoder(8).eval()(torch.rand(2, 8, size, size)).shape == (2, 128)


def test_token_decoder_reads_the_mean_or_the_class_token() -> None:
    tokens = torch.rand(3, 5, 8)
    decoder = TokenDecoder(8, blocks=0)
    torch.testing.assert_close(decoder(tokens), decoder.mlp(decoder.norm(tokens).mean(1)))
    first = TokenDecoder(8, blocks=0, class_token=True)
    torch.testing.assert_close(first(tokens), first.mlp(first.norm(tokens[:, 0])))
    assert TokenDecoder(128, blocks=2)(torch.rand(2, 5, 128)).shape == (2, 128)


@pytest.mark.parametrize(
    ("decoder", "features", "expected"),
    [
        (MLPDecoder(8), (2, 5, 8), r"MLPDecoder reads \(N, 8, ...\); got \(2, 5, 8\)"),
        (MLPDecoder(8, grid=2), (2, 8), r"MLPDecoder reads \(N, 8, H, W\) with grid=2; got \(2, 8\)"),
        (PlainConvDecoder(8), (2, 8), r"PlainConvDecoder reads \(N, 8, H, W\); got \(2, 8\)"),
        (ConvMLPDecoder(8), (2, 8), r"ConvMLPDecoder reads \(N, 8, H, W\); got \(2, 8\)"),
        (TokenDecoder(8), (2, 8, 4, 4), r"TokenDecoder reads \(N, T, 8\); got \(2, 8, 4, 4\)"),
    ],
)
def test_features_of_the_wrong_shape_are_named(decoder: nn.Module, features: tuple[int, ...], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        decoder(torch.zeros(features))


def test_impossible_decoders_are_refused() -> None:
    with pytest.raises(ValueError, match="depth=0"):
        MLPDecoder(8, depth=0)
    with pytest.raises(ValueError, match="at least one cell a side; got grid=0"):
        MLPDecoder(8, grid=0)
    with pytest.raises(ValueError, match=r"at least one convolution; got 0\. Without any it is MLPDecoder"):
        PlainConvDecoder(8, convolutions=0)
    with pytest.raises(ValueError, match=r"widths=\(8, 8\) for blocks=1"):
        ConvMLPDecoder(8, blocks=1, widths=(8, 8))
