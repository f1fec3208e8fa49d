"""InfoNCE keeps its accuracy where others lose it: saturated pairs, tiny temperatures, zero rows, half precision."""

import pytest
import torch
from infonce_oracle import oracle, pairs
from torch import Tensor

from locallearn import info_nce
from locallearn.losses._precision import pull, pull_back

DTYPES = [torch.bfloat16, torch.float16]
FORMS = ["nt-xent", "two-way", "one-way"]


LABELS = torch.tensor([0, 1, 0, 2, 1, 0])
INPUT_CASES = [
    *({"form": form, "tile": tile} for form in FORMS for tile in (None, 16)),
    {"labels": torch.arange(48) // 3},
    {"negatives": 9},
    {"temperature": 0.02},
]


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


@pytest.mark.parametrize("size", [1e-42, 1e-36, 1e-25, 1e-12, 1e12, 1e21, 1e30, 1e37])
@pytest.mark.parametrize("options", [{}, {"tile": 0}, {"tile": 4}, {"form": "one-way"}, {"labels": LABELS}], ids=str)
def test_rows_of_any_length_in_single_precision(options: dict, size: float) -> None:
    z0, z1 = (view.detach().float() for view in pairs(6, 8))
    lengths = torch.tensor([1.0, size, 1.0, size, size, 1.0])[:, None]
    scaled = [(z0 * lengths).requires_grad_(), (z1 * size).requires_grad_()]
    exact = [view.detach().double().requires_grad_() for view in scaled]
    loss, expected = info_nce(*scaled, **options), info_nce(*exact, **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    found, wanted = torch.autograd.grad(loss, scaled), torch.autograd.grad(expected, exact)
    for mine, theirs in zip(found, wanted, strict=True):
        held = theirs.abs() < torch.finfo(torch.float32).max
        torch.testing.assert_close(
            mine[held].double(), theirs[held], rtol=1e-3, atol=float(theirs[held].abs().max()) * 1e-5
        )
        assert not mine.isnan().any()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_negatives_of_any_length(size: float) -> None:
    query, key = (view.detach().float() for view in pairs(6, 8))
    queue = torch.randn(5, 8)
    for negatives in (queue, torch.randn(6, 5, 8)):
        torch.testing.assert_close(
            info_nce(query, key, negatives=negatives * size), info_nce(query, key, negatives=negatives)
        )


def test_rows_of_any_length_in_double_precision() -> None:
    z0, z1 = (view.detach() for view in pairs(6, 8))
    for size in (1e-290, 1e-170, 1e170, 1e290):
        torch.testing.assert_close(info_nce(z0 * size, z1), info_nce(z0, z1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", INPUT_CASES, ids=str)
def test_products_of_the_inputs_precision_are_as_exact_as_the_inputs(options: dict, dtype: torch.dtype) -> None:
    views = pairs(48, 32, dtype=dtype)
    exact = [view.detach().double().requires_grad_() for view in views]
    if "negatives" in options:
        options = {"negatives": torch.randn(options["negatives"], 32).to(dtype)}
    loss, expected = info_nce(*views, **options, precision="input"), info_nce(*exact, **options)
    assert loss.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), expected, rtol=2 * eps, atol=0)
    error = relative_error(list(torch.autograd.grad(loss, views)), list(torch.autograd.grad(expected, exact)))
    assert error < 3 * eps
    single = relative_error(gradients(views, **options), list(torch.autograd.grad(info_nce(*exact, **options), exact)))
    assert single < error  # or else nothing was rounded


def test_weights_below_the_range_of_half_precision_are_not_lost() -> None:
    weights, rows = torch.randn(5, 7).double() * 1e-12, torch.randn(7, 4).half()
    for found, expected in (
        (pull(weights.float(), rows), weights @ rows.double()),
        (pull_back(weights.t().float(), rows), weights @ rows.double()),
    ):
        assert relative_error([found], [expected]) < torch.finfo(torch.float16).eps
    assert (pull(torch.zeros(5, 7), rows) == 0).all()


def test_single_precision_in_means_single_precision_products() -> None:
    views = pairs(6, 8, dtype=torch.float32)
    assert torch.equal(info_nce(*views, precision="input"), info_nce(*views))
    mixed = [views[0].detach().bfloat16(), views[1].detach()]
    assert torch.equal(info_nce(*mixed, precision="input"), info_nce(*mixed))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 3, 40, 100])
def test_a_kept_matrix_and_tiles_agree(n: int, dtype: torch.dtype, form: str) -> None:
    views = pairs(n, 16, dtype=dtype)
    kept, tiled = (info_nce(*views, form=form, tile=tile, return_top1=True) for tile in (None, 32))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(kept[0], tiled[0], rtol=tolerance, atol=0)
    assert kept[1] == tiled[1]
    found, expected = (torch.autograd.grad(loss, views) for loss, _ in (kept, tiled))
    assert relative_error(list(found), [e.double() for e in expected]) < tolerance
