"""InfoNCE keeps its accuracy where others lose it: saturated pairs, tiny temperatures, zero rows, half precision."""

import pytest
import torch
from infonce_oracle import oracle, pairs
from torch import Tensor

from locallearn import info_nce

FORMS = ["nt-xent", "two-way", "one-way"]


def relative_error(of: list[Tensor], to: list[Tensor]) -> float:
    difference = torch.cat([a.double() - b for a, b in zip(of, to, strict=True)]).norm()
    return float(difference / torch.cat(list(to)).norm())


def gradients(views: list[Tensor], **options: object) -> list[Tensor]:
    return list(torch.autograd.grad(info_nce(*views, **options), views))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("noise", [100.0, 1.0, 0.1, 0.03], ids=["random", "related", "aligned", "very aligned"])
@pytest.mark.parametrize(("temperature", "bound"), [(0.1, 3e-6), (0.02, 3e-5)])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16 autocast"])
def test_single_precision_gradient_is_that_of_double(
    form: str, noise: float, temperature: float, bound: float, autocast: bool
) -> None:
    views = pairs(48, 128, noise=noise, dtype=torch.float32)
    exact = [view.detach().double().requires_grad_() for view in views]
    expected = gradients(exact, form=form, temperature=temperature)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = gradients(views, form=form, temperature=temperature)  # backward inside autocast, too
    assert relative_error(found, expected) <= bound


def test_double_precision_reference_does_not_cancel() -> None:
    views = pairs(6, 16, noise=0.3)
    high = oracle([view.detach() for view in views], 0.1)
    torch.testing.assert_close(info_nce(*views, reduction="none"), high, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tile", [None, 0])
@pytest.mark.parametrize("learnable", [False, True])
def test_tiny_temperatures_give_no_nan(form: str, tile: int | None, learnable: bool) -> None:
    for noise in (0.1, 1.0, 3.0):
        views = pairs(40, 32, noise=noise, dtype=torch.float32)
        exact = [view.detach().double().requires_grad_() for view in views]
        temperature = torch.tensor(0.004, requires_grad=True) if learnable else 0.004
        found = gradients(views, form=form, temperature=temperature, tile=tile)
        assert all(gradient.isfinite().all() for gradient in found)
        expected = gradients(exact, form=form, temperature=0.004)
        representable = max(gradient.abs().max() for gradient in expected) > 1e-30
        assert noise == 0.1 or representable
        assert not representable or relative_error(found, expected) < 1e-3


def test_a_loss_of_1e_minus_10_is_not_rounded_to_zero() -> None:
    views = pairs(48, 128, noise=0.01)
    exact = info_nce(*views, temperature=0.02)
    assert 0 < exact < 1e-8
    single = info_nce(*(view.float() for view in views), temperature=0.02)
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tile", [None, 0])
def test_a_zero_row_gets_a_zero_gradient_and_spoils_no_other(dtype: torch.dtype, tile: int | None) -> None:
    views = [view.detach().to(dtype) for view in pairs(6, 8)]
    views[0][2] = 0
    views = [view.requires_grad_() for view in views]
    first, second = gradients(views, tile=tile)
    assert (first[2] == 0).all()
    assert first.isfinite().all()
    assert second.isfinite().all()
    assert (first[[0, 1, 3, 4, 5]] != 0).any(1).all()


def test_zero_rows_among_the_negatives_get_zero_gradients() -> None:
    query, key = pairs(6, 8)
    queue = torch.randn(5, 8, dtype=torch.float64)
    queue[3] = 0
    queue.requires_grad_()
    for negatives in (queue, queue.expand(6, 5, 8)):
        (gradient,) = torch.autograd.grad(info_nce(query, key, negatives=negatives), queue)
        assert (gradient[3] == 0).all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_goes_in_and_single_comes_out(dtype: torch.dtype) -> None:
    views = pairs(32, 16, dtype=dtype)
    exact = [view.detach().double().requires_grad_() for view in views]
    loss = info_nce(*views)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), info_nce(*exact), rtol=1e-6, atol=0)
    found = torch.autograd.grad(loss, views)
    assert found[0].dtype == dtype
    assert relative_error(list(found), gradients(exact)) < 2 * torch.finfo(dtype).eps  # the rounding of the result


@pytest.mark.parametrize("tile", [None, 0, 2])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_nan_in_gives_nan_out(tile: int | None, temperature: float) -> None:
    z0, z1 = (view.detach() for view in pairs(6, 8))
    z0[1, 3] = torch.nan
    assert info_nce(z0, z1, temperature=temperature, tile=tile).isnan()
    assert info_nce(z0, z1, temperature=temperature, tile=tile, negatives=z1).isnan()
    assert info_nce(z0, z1, temperature=temperature, tile=tile, labels=torch.arange(6) % 3).isnan()


def test_a_learnable_temperature_below_zero_gives_nan() -> None:
    assert info_nce(*pairs(6, 8), temperature=torch.tensor(-0.1)).isnan()


@pytest.mark.parametrize("temperature", [0.1, 0.004])
def test_loss_does_not_depend_on_the_lengths_of_the_rows(temperature: float) -> None:
    z0, z1 = (view.detach() for view in pairs(6, 8))
    lengths = torch.logspace(-6, 6, 6, dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        info_nce(z0 * lengths, z1, temperature=temperature), info_nce(z0, z1, temperature=temperature)
    )
