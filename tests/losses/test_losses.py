"""InfoNCE computes what its definition says, in every form, and its gradient."""

import math
from itertools import product

import pytest
import torch
from infonce_oracle import nearest_is_positive, oracle, pairs
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import locallearn.losses._flops  # noqa: F401 - teaches the flop counter our operators
from locallearn import InfoNCE, info_nce

TILES = [None, 0, 1, 3, 5, 64]
LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3])
CASES = [
    *(
        {"views": 2, "form": form, "labels": labels}
        for form, labels in product(["nt-xent", "two-way", "one-way"], [0, 1])
    ),
    *({"views": 2, "form": form, "labels": 1, "same_label": "ignore"} for form in ["nt-xent", "two-way", "one-way"]),
    *({"views": views, "form": "nt-xent", "labels": labels} for views, labels in [(1, 1), (3, 0), (3, 1), (4, 0)]),
]


def views_of(count: int, n: int = 7, d: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(n, d, generator=generator, dtype=dtype).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.02])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradients_are_those_of_the_definition(case: dict, temperature: float, tile: int | None) -> None:
    views = views_of(case["views"])
    labels = LABELS if case["labels"] else None
    form, same_label = case["form"], case.get("same_label", "attract")
    expected = oracle(views, temperature, form, labels, same_label)
    losses = info_nce(
        *views, temperature=temperature, form=form, labels=labels, same_label=same_label, reduction="none", tile=tile
    )
    expected = expected[0] if form == "one-way" else expected
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    weights = torch.rand(expected.shape, dtype=torch.float64) - 0.3
    torch.testing.assert_close(
        torch.autograd.grad((losses * weights).sum(), views),
        torch.autograd.grad((expected * weights).sum(), views),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("paired", [False, True])
def test_given_negatives_replace_those_of_the_batch(paired: bool, tile: int | None) -> None:
    query, key = views_of(2)
    negatives = torch.randn(*([7] if paired else []), 9, 4, dtype=torch.float64, requires_grad=True)
    losses = info_nce(query, key, negatives=negatives, reduction="none", tile=tile)
    q, k, n = (F.normalize(z, dim=-1) for z in (query, key, negatives))
    logits = torch.cat([(q * k).sum(1, keepdim=True), (n @ q[:, :, None])[..., 0] if paired else q @ n.T], dim=1) / 0.1
    expected = F.cross_entropy(logits, torch.zeros(7, dtype=torch.long), reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    weights = torch.rand(7, dtype=torch.float64)
    inputs = (query, key, negatives)
    torch.testing.assert_close(
        torch.autograd.grad(losses @ weights, inputs), torch.autograd.grad(expected @ weights, inputs)
    )


def test_negatives_that_need_no_gradient_leave_the_others_unchanged() -> None:
    query, key = views_of(2)
    queue = torch.randn(9, 4, dtype=torch.float64)
    with_queue = torch.autograd.grad(info_nce(query, key, negatives=queue.clone().requires_grad_()), (query, key))
    without = torch.autograd.grad(info_nce(query, key, negatives=queue), (query, key))
    assert all(map(torch.equal, with_queue, without))


def test_only_the_key_may_need_a_gradient() -> None:
    query, key = views_of(2)
    both = torch.autograd.grad(info_nce(query, key), (query, key))
    (alone,) = torch.autograd.grad(info_nce(query.detach(), key), key)
    torch.testing.assert_close(alone, both[1], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (2, 7)),
        ({"form": "two-way"}, (2, 7)),
        ({"form": "one-way"}, (7,)),
        ({"negatives": torch.randn(3, 4)}, (7,)),
        ({"labels": LABELS}, (2, 7)),
    ],
)
def test_reductions_are_those_of_the_rows(options: dict, shape: tuple[int, ...], reduction: str) -> None:
    views = views_of(2)
    rows, right = info_nce(*views, **options, reduction="none", return_top1=True)
    assert rows.shape == right.shape == shape
    loss, top1 = info_nce(*views, **options, reduction=reduction, return_top1=True)
    torch.testing.assert_close(loss, getattr(rows, reduction)())
    torch.testing.assert_close(top1, right.float().mean())
    torch.testing.assert_close(
        torch.autograd.grad(3 * loss, views), torch.autograd.grad(3 * getattr(rows, reduction)(), views)
    )


@pytest.mark.parametrize(("form", "candidates"), [("nt-xent", 2 * 7 - 1), ("two-way", 7), ("one-way", 7)])
def test_where_nothing_is_learnt_the_loss_is_the_log_of_the_candidates(form: str, candidates: int) -> None:
    same = torch.ones(7, 4, dtype=torch.float64)
    torch.testing.assert_close(info_nce(same, same, form=form).item(), math.log(candidates))


def test_with_a_queue_of_m_the_loss_of_equals_is_log_of_m_plus_one() -> None:
    same = torch.ones(7, 4, dtype=torch.float64)
    torch.testing.assert_close(info_nce(same, same, negatives=same[:5]).item(), math.log(6))


def test_it_is_half_of_google_s_simclr_objective() -> None:
    z0, z1 = views_of(2)
    a, b = F.normalize(z0), F.normalize(z1)
    eye, target = torch.eye(7, dtype=torch.float64) * 1e9, torch.arange(7)
    logits_aa, logits_bb, logits_ab = a @ a.T / 0.1 - eye, b @ b.T / 0.1 - eye, a @ b.T / 0.1
    loss_a = F.cross_entropy(torch.cat([logits_ab, logits_aa], 1), target)
    loss_b = F.cross_entropy(torch.cat([logits_ab.T, logits_bb], 1), target)
    torch.testing.assert_close(2 * info_nce(z0, z1), loss_a + loss_b)


def test_labels_all_different_are_no_labels() -> None:
    views = [view.detach().float().requires_grad_() for view in pairs(7, 4, noise=0.01)]
    plain = torch.autograd.grad(info_nce(*views, temperature=0.02), views)
    labelled = torch.autograd.grad(info_nce(*views, temperature=0.02, labels=torch.arange(7)), views)
    for mine, theirs in zip(labelled, plain, strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm()  # where lse - s would be wrong in the first digit


@pytest.mark.parametrize("labels", [torch.zeros(7, dtype=torch.long), torch.arange(7)], ids=["one", "many"])
@pytest.mark.parametrize("tile", [None, 0, 3])
def test_rows_without_negatives_or_positives_have_finite_gradients(labels: Tensor, tile: int | None) -> None:
    (view,) = views_of(1)
    loss = info_nce(view, labels=labels, tile=tile)
    torch.testing.assert_close(loss, oracle([view], labels=labels).mean())
    assert torch.autograd.grad(loss, view)[0].isfinite().all()


@pytest.mark.parametrize("tile", [None, 0, 3])
@pytest.mark.parametrize("form", ["nt-xent", "two-way", "one-way"])
def test_a_learnable_temperature_is_the_number_that_it_holds(form: str, tile: int | None) -> None:
    temperature, views = torch.tensor([0.3], dtype=torch.float64, requires_grad=True), views_of(2)
    loss, expected = (info_nce(*views, temperature=t, form=form, tile=tile) for t in (temperature, 0.3))
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, views), torch.autograd.grad(expected, views))


@pytest.mark.parametrize("tile", [None, 0, 3])
@pytest.mark.parametrize("form", ["nt-xent", "two-way", "one-way"])
def test_gradcheck_with_a_learnable_temperature(form: str, tile: int | None) -> None:
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z0, z1, t: info_nce(z0, z1, temperature=t, form=form, tile=tile), (*views_of(2), temperature)
    )


@pytest.mark.parametrize("tile", [None, 0])
def test_gradcheck_of_labels_and_negatives(tile: int | None) -> None:
    queue = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *z: info_nce(*z, labels=LABELS, temperature=0.4, tile=tile), views_of(2))
    assert torch.autograd.gradcheck(
        lambda q, k, n: info_nce(q, k, negatives=n, temperature=0.4, tile=tile), (*views_of(2), queue)
    )


@pytest.mark.parametrize("tile", [None, 0, 3])
def test_top1_counts_the_rows_whose_nearest_row_is_a_positive(tile: int | None) -> None:
    views = views_of(3)
    unit = F.normalize(torch.cat(views), dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-2)
    expected = (similarity.argmax(1) % 7 == torch.arange(21) % 7).view(3, 7)
    _, rows = info_nce(*views, return_top1=True, reduction="none", tile=tile)
    loss, share = info_nce(*views, return_top1=True, tile=tile)
    assert torch.equal(rows, expected)
    assert 0 < share == expected.float().mean() < 1
    torch.testing.assert_close(loss, info_nce(*views))


@pytest.mark.parametrize("tile", [None, 0, 3])
@pytest.mark.parametrize("temperature", [0.1, 0.01], ids=["bounded", "unbounded"])
@pytest.mark.parametrize(
    "options",
    [
        *({"form": form} for form in ("nt-xent", "two-way", "one-way")),
        {"labels": LABELS},
        {"labels": LABELS, "same_label": "ignore"},
        {"labels": LABELS, "form": "one-way"},
    ],
    ids=str,
)
def test_top1_is_the_oracles_in_every_form(options: dict, temperature: float, tile: int | None) -> None:
    views = pairs(7, 4, noise=1.5)
    expected = nearest_is_positive(views, **options)
    loss, top1 = info_nce(*views, **options, temperature=temperature, tile=tile, return_top1=True)
    assert 0 < top1.item() < 1
    torch.testing.assert_close(top1, expected.float().mean())
    assert (top1.shape, top1.requires_grad) == ((), False)
    assert torch.equal(loss, info_nce(*views, **options, temperature=temperature, tile=tile))


@pytest.mark.parametrize(
    "options",
    [{}, {"form": "one-way"}, {"labels": LABELS}, {"negatives": torch.randn(5, 4)}],
    ids=["NT-Xent", "one-way", "labels", "negatives"],
)
def test_top1_takes_no_further_product(options: dict) -> None:
    counts = []
    for return_top1 in (False, True):
        with FlopCounterMode(display=False) as counter:
            info_nce(*views_of(2), **options, return_top1=return_top1)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_module_gives_top1_in_the_calls_that_ask_for_it() -> None:
    views = views_of(2)
    expected = info_nce(*views, form="one-way", return_top1=True)
    for always in (False, True):
        criterion = InfoNCE(form="one-way", return_top1=always)
        assert criterion(*views, return_top1=True) == expected
        assert criterion(*views, return_top1=False) == expected[0]


def test_top1_with_labels_accepts_any_row_of_the_label() -> None:
    z = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.6, 0.4]])  # each one's nearest: 1, 0, 3, 1
    _, rows = info_nce(z, labels=torch.tensor([0, 0, 1, 1]), return_top1=True, reduction="none")
    assert rows.tolist() == [[True, True, True, False]]


def test_collapsed_embeddings_are_not_right() -> None:
    same = torch.ones(6, 4)
    assert info_nce(same, same, tile=0, return_top1=True)[1] == 0


def test_module_is_the_function() -> None:
    views = views_of(2)
    module = InfoNCE(0.2, form="two-way", reduction="sum")
    assert torch.equal(module(*views), info_nce(*views, temperature=0.2, form="two-way", reduction="sum"))


def test_module_takes_targets_as_the_last_positional_argument() -> None:
    views = views_of(2)
    assert torch.equal(InfoNCE()(*views, LABELS), info_nce(*views, labels=LABELS))
    assert torch.equal(InfoNCE()(views[0], LABELS), info_nce(views[0], labels=LABELS))


def test_learnable_temperature_is_a_parameter_and_a_fixed_tensor_a_buffer() -> None:
    module = InfoNCE(torch.nn.Parameter(torch.tensor(0.1)))
    module(*views_of(2)).backward()
    assert module.temperature.grad is not None
    assert "temperature" in InfoNCE(torch.tensor(0.1)).state_dict()
    assert not InfoNCE(0.1).state_dict()
