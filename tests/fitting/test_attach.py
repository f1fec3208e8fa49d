"""Every unit's decoder is built for the outlet it reads, and tried there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from locallearn import Hard, MLPDecoder, Plan, Soft
from locallearn._fitting.attach import attach
from locallearn._fitting.outlets import Outlet

SHAPES = [(2, 4, 8, 8), (2, 6, 4, 4), (2, 4, 4, 5)]  # the last with channels last


def outlets(*modules: nn.Module | None) -> list[Outlet]:
    return [Outlet(torch.rand(shape), module) for shape, module in zip(SHAPES, modules or [None] * 3, strict=True)]


def test_the_callable_is_told_the_width_of_each_units_last_outlet() -> None:
    widths: list[int] = []

    def decoder(width: int) -> nn.Module:
        widths.append(width)
        return MLPDecoder(width)

    attach(decoder, Plan.windows(3, 0), Hard(), outlets(), None, torch.float64)
    attach(decoder, Plan.windows(3, 1), Hard(), outlets(), None, torch.float64)
    assert widths == [4, 6, 5, 6, 5]


def test_maps_with_channels_last_are_turned_round_before_the_decoder() -> None:
    attached = attach(MLPDecoder, Plan.windows(3, 2), Hard(), outlets(), None, torch.float64)
    maps = torch.rand(3, 4, 4, 5)
    (whole,) = attached
    torch.testing.assert_close(whole(maps), whole[1](maps.movedim(-1, 1)))  # type: ignore[index]


def test_weights_follow_the_outlets_device_and_the_given_dtype() -> None:
    attached = attach(
        lambda width: MLPDecoder(width).float(), Plan.windows(3, 1), Hard(), outlets(), None, torch.float64
    )
    assert {weight.dtype for weight in attached.parameters()} == {torch.float64}


def test_with_soft_sharing_the_decoder_is_as_wide_as_the_copied_stages_outlet() -> None:
    above = nn.Conv2d(4, 9, 3)
    attached = attach(
        MLPDecoder, Plan.windows(3, 0), Soft(), outlets(None, above, nn.Conv2d(6, 7, 1)), None, torch.float64
    )
    assert attached[0][1].channels == 9  # type: ignore[index]
    assert attached[0](torch.rand(2, 4, 8, 8)).shape == (2, 128)


def test_a_decoder_that_fails_there_is_named_with_the_shape() -> None:
    with pytest.raises(
        ValueError, match=r"decoder of unit 1 does not run on the outlet it reads, of shape \(2, 4, 4, 5\)"
    ):
        attach([MLPDecoder(6), MLPDecoder(6)], Plan.windows(3, 1), Hard(), outlets(), None, torch.float64)
