"""With three processes, InfoNCE has the gradient of the whole batch, as DistributedDataParallel averages it."""

import copy
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from locallearn import InfoNCE, info_nce

RANKS = 3
EVEN, UNEVEN = [4, 4, 4], [5, 2, 1]
OPTIONS = [
    *({"form": form, "tile": tile} for form in ("nt-xent", "two-way", "one-way") for tile in (None, 0, 3)),
    {"reduction": "sum"},
    {"temperature": 0.01},
    {"views": 3},
    {"labels": True},
    {"labels": True, "tile": 0},
    {"labels": True, "same_label": "ignore"},
    {"views": 1, "labels": True},
    {"reduction": "none"},
    {"reduction": "none", "form": "one-way"},
]
CASES = [(counts, options) for counts in (EVEN, UNEVEN) for options in OPTIONS]


def data(counts: list[int], views: int = 2) -> tuple[list[Tensor], Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(sum(counts), 5, generator=generator, dtype=torch.float64) for _ in range(views)]
    labels = torch.randint(0, 4, (sum(counts),), generator=generator)
    model = nn.Linear(5, 4, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.randn(4, 5, generator=generator, dtype=torch.float64))
        model.bias.zero_()
    return images, labels, model


def loss_of(model: nn.Module, images: list[Tensor], labels: Tensor, options: dict, gather: bool | str) -> Tensor:
    options = dict(options)
    options.pop("views", None)
    if options.pop("labels", False):
        options["labels"] = labels
    loss = info_nce(*(model(image) for image in images), gather=gather, **options)
    if options.get("reduction") == "none":  # weights that differ from row to row and from rank to rank
        loss = (loss * (images[0][:, 0] + 2)).sum()
    return loss


def on_each_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    results = []
    for counts, options in CASES:
        images, labels, model = data(counts, options.get("views", 2))
        mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        parallel = DistributedDataParallel(model)
        loss = loss_of(parallel, [image[mine] for image in images], labels[mine], options, "auto")
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        results.append((total / RANKS, model.weight.grad))
    refusals = []
    for rows in (torch.randn(4, 3 + (rank == 1)), torch.randn(4, 3)):
        try:
            info_nce(rows, rows)
            refusals.append("")
        except ValueError as error:
            refusals.append(str(error))
    z = torch.randn(4, 3, dtype=torch.float64)
    try:
        torch.func.grad(info_nce)(z, z + 1)
    except NotImplementedError as error:
        refusals.append(str(error))
    local = (info_nce(z, z + 1, gather=False), info_nce(z, z + 1, negatives=z - 1))
    one = info_nce(z[:1], z[:1] + 1)  # one pair per rank is three pairs
    leaf = z.clone().requires_grad_()
    loss = info_nce(leaf, z + 1)
    calls = []
    with patch.object(dist, "all_gather", calls.append), patch.object(dist, "reduce", calls.append):
        loss.backward()
    shares = top1_of_each_form(rank)
    groups = [dist.new_group(members) for members in GROUPS]
    grouped = [in_group(rank, groups[1 - rank % 2], groups[rank % 2], options) for options in OPTIONS]
    joined = under_join(rank)
    dist.destroy_process_group()
    alone = (info_nce(z, z + 1), info_nce(z, z + 1, negatives=z - 1))
    torch.save((results, refusals, local, alone, one, calls, shares, grouped, joined), f"{folder}/{rank}.pt")


FORMS = [{}, {"form": "two-way"}, {"form": "one-way"}, {"labels": True}, {"tile": 0}, {"reduction": "none"}]
GROUPS = [(0, 2), (1,)]


def top1_of_each_form(rank: int) -> list[Tensor]:
    (z0, z1), labels, _ = data(EVEN)
    mine = slice(4 * rank, 4 * rank + 4)
    shares = []
    for given in FORMS:
        options = {**given, "labels": labels[mine]} if "labels" in given else given
        _, top1 = info_nce(z0[mine], z0[mine] + z1[mine], return_top1=True, **options)
        shares.append(top1)
    return shares


def in_group(rank: int, other: object, group: object, options: dict) -> tuple[Tensor, Tensor, str]:
    """Value and gradient of the rows of this rank's group, averaged over it, and what is said to who is not in it."""
    images, labels, model = data(UNEVEN, options.get("views", 2))
    mine = slice(sum(UNEVEN[:rank]), sum(UNEVEN[: rank + 1]))
    loss = loss_of(model, [image[mine] for image in images], labels[mine], {**options, "group": group}, "auto")
    (gradient,) = torch.autograd.grad(loss, model.weight)
    found = torch.cat([loss.detach().view(1), gradient.flatten()])
    dist.all_reduce(found, group=group)
    try:
        refused = str(InfoNCE(group=other))
    except ValueError as error:
        refused = str(error)
    return found / dist.get_world_size(group), copy.deepcopy(InfoNCE(group=group)).group is group, refused


class WithLoss(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.layer, self.loss = nn.Linear(5, 4), InfoNCE(**options)

    def forward(self, *images: Tensor) -> Tensor:
        return self.loss(*map(self.layer, images))


def under_join(rank: int) -> tuple[str, bool]:
    """What is said inside of a module under `join()`; whether the loss is finite without gathering."""
    views = torch.randn(2, 4, 5)
    parallel = DistributedDataParallel(WithLoss(gather=False))
    with parallel.join():
        for _ in range(rank + 1):
            loss = parallel(*views)
            loss.backward()
    try:
        parallel = DistributedDataParallel(WithLoss())
        with parallel.join(), pytest.raises(RuntimeError, match="gather=False") as refusal:
            parallel(*views)
    except RuntimeError as error:  # join() itself, which nobody fed
        return str(error), False
    return str(refusal.value), bool(loss.isfinite())


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(on_each_rank, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[str(case) for case in CASES])
def test_gradient_and_value_are_those_of_the_whole_batch(case: int, outcomes: list[tuple]) -> None:
    counts, options = CASES[case]
    images, labels, model = data(counts, options.get("views", 2))
    loss = loss_of(model, images, labels, options, gather=False)
    (expected,) = torch.autograd.grad(loss, model.weight)
    if options.get("reduction") == "none":  # a sum on each rank, of which DistributedDataParallel takes the mean
        loss, expected = loss / RANKS, expected / RANKS
    for results, *_ in outcomes:
        value, gradient = results[case]
        torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_local_negatives_alone_would_be_another_loss() -> None:
    images, labels, model = data(EVEN)
    whole = loss_of(model, images, labels, {}, gather=False)
    part = loss_of(model, [image[:4] for image in images], labels[:4], {}, gather=False)
    assert not torch.isclose(whole, part, rtol=0.01)


def test_ranks_of_different_width_are_refused_on_every_rank(outcomes: list[tuple]) -> None:
    for _, (different, equal, _), *_ in outcomes:
        assert "(4, 3), (4, 4), (4, 3)" in different
        assert not equal


def test_without_gathering_each_rank_is_alone(outcomes: list[tuple]) -> None:
    for _, _, local, alone, *_ in outcomes:
        assert local == alone


def test_backward_of_a_mean_needs_no_collective(outcomes: list[tuple]) -> None:
    assert all(outcome[5] == [] for outcome in outcomes)


def test_one_pair_per_rank_is_enough(outcomes: list[tuple]) -> None:
    assert all(outcome[4].isfinite() for outcome in outcomes)


@pytest.mark.parametrize("case", range(len(FORMS)), ids=[str(case) for case in FORMS])
def test_top1_counts_the_candidates_of_every_rank(case: int, outcomes: list[tuple]) -> None:
    (z0, z1), labels, _ = data(EVEN)
    options = dict(FORMS[case], reduction="none")
    if options.pop("labels", False):
        options["labels"] = labels
    _, right = info_nce(z0, z0 + z1, return_top1=True, **options)
    assert 0 < right.float().mean() < 1
    for rank, outcome in enumerate(outcomes):
        expected, found = right[..., 4 * rank : 4 * rank + 4], outcome[6][case]
        assert torch.equal(found, expected if "reduction" in FORMS[case] else expected.float().mean())


@pytest.mark.parametrize("case", range(len(OPTIONS)), ids=[str(case) for case in OPTIONS])
def test_a_group_is_a_world_of_its_own(case: int, outcomes: list[tuple]) -> None:
    options = OPTIONS[case]
    images, labels, model = data(UNEVEN, options.get("views", 2))
    for members in GROUPS:
        rows = torch.cat([torch.arange(sum(UNEVEN[:rank]), sum(UNEVEN[: rank + 1])) for rank in members])
        loss = loss_of(model, [image[rows] for image in images], labels[rows], options, gather=False)
        (gradient,) = torch.autograd.grad(loss, model.weight)
        expected = torch.cat([loss.detach().view(1), gradient.flatten()])
        if options.get("reduction") == "none":
            expected = expected / len(members)
        for rank in members:
            found, kept, refused = outcomes[rank][7][case]
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            assert kept
            assert f"rank {rank} does not belong to group=" in refused


def test_join_is_refused_where_it_can_be_seen(outcomes: list[tuple]) -> None:
    for *_, (said, finite) in outcomes:
        assert "InfoNCE gathers rows of every rank" in said
        assert finite


def test_torch_func_does_not_reach_other_ranks(outcomes: list[tuple]) -> None:
    for _, (*_, transformed), *_ in outcomes:
        assert "gather=False" in transformed
