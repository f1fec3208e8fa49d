"""Numbers on vectors, against closed forms and scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from locallearn.diagnosis import effective_rank, measures, spread
from locallearn.diagnosis.kept import OnDisk, Sample


def test_the_spread_is_one_on_an_even_sphere_and_zero_in_a_point() -> None:
    assert spread(torch.randn(4000, 64)).item() == pytest.approx(1, abs=0.01)
    assert spread(torch.ones(10, 8) * torch.rand(10, 1)).item() == pytest.approx(0, abs=1e-6)
    assert spread(torch.cat([torch.eye(4), -torch.eye(4)])).item() == pytest.approx(1)


def test_the_effective_rank_of_equal_directions_is_their_number() -> None:
    basis = torch.linalg.qr(torch.randn(40, 6)).Q @ torch.linalg.qr(torch.randn(10, 10)).Q[:6]
    assert effective_rank(basis) == pytest.approx(6)
    assert effective_rank(torch.ones(40, 1) @ torch.rand(1, 10)) == pytest.approx(1)
    assert effective_rank(torch.zeros(3, 4)) == 0
    assert np.isnan(effective_rank(torch.tensor([[1.0, torch.nan]])))


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_moments_of_batches_give_what_all_rows_give(offset: float) -> None:
    rows = torch.randn(200, 12) @ torch.randn(12, 12) + offset * torch.rand(12)
    rows[:, 3] = rows[:, 2]  # a direction that is missing
    moments = measures.Moments()
    for batch in rows.split(7):
        moments.add(batch)
    assert moments.effective_rank() == pytest.approx(effective_rank(rows), rel=1e-6)
    centred = rows - rows.mean(dim=0)
    assert torch.allclose(moments.centred(), centred.T @ centred, rtol=1e-10, atol=1e-9)


def test_uniformity_and_alignment_are_those_of_the_paper() -> None:
    points = torch.nn.functional.normalize(torch.randn(50, 5), dim=1)
    pairs = torch.pdist(points).square()
    assert measures.uniformity(3 * points) == pytest.approx(pairs.mul(-2).exp().mean().log().item())
    assert measures.uniformity(torch.ones(4, 3)) == pytest.approx(0)
    assert np.isnan(measures.uniformity(points[:1]))
    assert measures.alignment(points, -2 * points).tolist() == pytest.approx([4] * 50)


def test_tiles_find_the_same_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, known = torch.randn(9, 6), torch.randn(100, 6)
    whole = measures.nearest(queries, known, 7)
    monkeypatch.setattr(measures, "_TILE", 16 * 5)  # five rows at a time
    tiled = measures.nearest(queries, known, 7)
    assert torch.equal(whole[1], tiled[1])
    cosines = torch.nn.functional.cosine_similarity(queries[:, None], known[None], dim=2)
    assert torch.allclose(tiled[0], cosines.topk(7).values)
    assert measures.uniformity(known) == pytest.approx(
        torch.pdist(torch.nn.functional.normalize(known, dim=1)).square().mul(-2).exp().mean().log().item()
    )


def test_the_vote_is_scikit_learns() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors", reason="the examples need the extra `examples`")
    known, labels, queries = torch.randn(80, 5), torch.randint(4, (80,)), torch.randn(60, 5)
    theirs = neighbors.KNeighborsClassifier(
        9, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(known.numpy(), labels.numpy())
    assert measures.vote(queries, known, labels, 9).tolist() == theirs.predict(queries.numpy()).tolist()


def test_a_sample_is_uniform_and_bounded() -> None:
    counts = torch.zeros(40)
    for seed in range(3000):
        sample = Sample(8, seed)
        for rows in torch.arange(40).split(7):
            sample.add([rows, 2 * rows])
        kept, twice = sample.columns()
        assert torch.equal(2 * kept, twice)
        assert len(set(kept.tolist())) == 8
        counts[kept] += 1
    assert sample.seen == 40
    assert (counts / 3000 - 0.2).abs().max() < 5 * (0.2 * 0.8 / 3000) ** 0.5


def test_a_sample_of_fewer_keeps_all_in_order() -> None:
    sample = Sample(50)
    sample.add([torch.arange(5)])
    sample.add([torch.arange(5, 9)])
    assert sample.columns()[0].tolist() == list(range(9))


def test_what_lies_on_the_disk_is_what_was_added(tmp_path: Path) -> None:
    rows, labels = torch.randn(20, 3), torch.arange(20)
    disk = OnDisk(tmp_path)
    for part, which in zip(rows.split(6), labels.split(6), strict=True):
        disk.add([part, which])
    assert torch.equal(disk.columns()[0], rows)
    assert torch.equal(disk.columns()[1], labels)
