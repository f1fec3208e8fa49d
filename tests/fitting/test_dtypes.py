"""Outlets of any floating or complex dtype; the decoder follows its own outlet."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_same, gradients, oracle
from torch import Tensor, nn
from zoo import small_net

from locallearn import InfoNCE, LocalWrapper, MLPDecoder, Plan


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def mixed(*dtypes: torch.dtype) -> nn.Sequential:
    """A stage of each dtype."""
    widths = [3, *(4 for _ in dtypes)]
    return nn.Sequential(
        *(
            nn.Sequential(Cast(dtype), nn.Conv2d(width, 4, 3, padding=1, dtype=dtype))
            for width, dtype in zip(widths, dtypes, strict=False)
        )
    )


def wrap(net: nn.Module, **options: object) -> LocalWrapper:
    return LocalWrapper(net, [0, 1, 2], **{"decoder": MLPDecoder, "example": torch.rand(2, 3, 8, 8), **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("entry", ["local_step", "forward"])
@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize(
    ("dtypes", "tolerance"),  # where gradients of biases nearly cancel, rounding is most of them
    [
        (
            (torch.float32, torch.bfloat16, torch.bfloat16),
            0.3,
        ),  # a small bias's gradient: 0.26 with torch 2.6's kernels
        ((torch.float32, torch.float64, torch.float64), 1e-2),
        ((torch.float64, torch.float32, torch.float64), 1e-2),
    ],
)
def test_a_decoder_has_the_dtype_of_its_outlet(
    dtypes: tuple[torch.dtype, ...], tolerance: float, overlap: int, entry: str
) -> None:
    model = wrap(mixed(*dtypes), overlap=overlap)
    for unit, decoder in zip(model.plan.units, model.decoders, strict=True):
        assert {weight.dtype for weight in decoder.parameters()} == {dtypes[unit.last]}
    pair = torch.rand(2, 4, 3, 8, 8).unbind()
    expected = oracle(model, *pair)[1]
    if entry == "local_step":
        model.local_step(*pair)
    else:
        model(*pair).backward()
    assert_same(gradients(model), expected, tolerance)


def test_under_autocast_decoders_have_the_dtype_of_the_weights() -> None:
    net = small_net().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = wrap(net, example=torch.rand(2, 3, 8, 8, dtype=torch.float32))
        model.local_step(*torch.rand(2, 4, 3, 8, 8, dtype=torch.float32))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_cuts_are_found_in_a_backbone_of_another_dtype() -> None:
    net = nn.Sequential(*[nn.Conv2d(3 if k == 0 else 8, 8, 3, padding=1) for k in range(4)]).bfloat16()
    model = LocalWrapper(net, "auto", plan=Plan.windows(3, 1), example=torch.rand(2, 3, 16, 16, dtype=torch.bfloat16))
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------- complex outlets


class Magnitudes(nn.Module):
    """A decoder that makes its outlet real."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 1, dtype=torch.complex64)
        self.mlp = MLPDecoder(width, out_features=16)

    def forward(self, maps: Tensor) -> Tensor:
        return self.mlp(self.mix(maps).abs())  # type: ignore[no-any-return]


def complex_net() -> nn.Sequential:
    return mixed(torch.float64, torch.complex128, torch.complex128)


@pytest.mark.parametrize("entry", ["local_step", "forward"])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_gradients_through_complex_outlets_are_exact(overlap: int, checkpoint: bool, entry: str) -> None:
    plan = Plan.windows(3, overlap)
    decoders = [MLPDecoder(4) if unit.last == 0 else Magnitudes(4) for unit in plan.units]
    model = wrap(complex_net(), overlap=overlap, decoder=decoders, checkpoint=checkpoint)
    assert {weight.dtype for weight in model.decoders[-1].parameters()} == {torch.float64, torch.complex128}
    pair = torch.rand(2, 4, 3, 8, 8).unbind()
    losses, expected = oracle(model, *pair)
    if entry == "local_step":
        model.local_step(*pair)
    else:
        model(*pair).backward()
    torch.testing.assert_close(model.losses, losses)
    assert_same(gradients(model), expected)


def test_a_decoder_that_takes_no_complex_outlet_is_told_what_to_begin_with() -> None:
    with pytest.raises(ValueError, match=r"decoder of unit 0 does not run .*complex: begin .* such as abs\(\)"):
        wrap(complex_net())


def test_a_complex_loss_is_refused() -> None:
    model = wrap(small_net(), loss=lambda a, b: InfoNCE()(a, b) * 1j)
    with pytest.raises(ValueError, match=r"loss of unit 0 is complex, torch.complex128; .* real"):
        model.local_step(*torch.rand(2, 4, 3, 8, 8))
