"""Every stage's features, read out in one pass, beside what all features in memory give."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diagnosis.state import assert_same, state_of
from torch import Tensor, nn

from locallearn import LocalWrapper, MLPDecoder, TokenDecoder
from locallearn.diagnosis import effective_rank, linear_cka, measures, quality, stage_quality

sklearn = pytest.importorskip("sklearn", reason="the examples need the extra `examples`")


def wrapped() -> LocalWrapper:
    layers = [
        nn.Sequential(nn.Conv2d(3 if k == 0 else 6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(True))
        for k in range(3)
    ]
    return LocalWrapper(nn.Sequential(*layers), [0, 1, 2], decoder=MLPDecoder)


def images(count: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % 3 + 4  # classes need not begin with 0
    return torch.rand(count, 3, 6, 6) + 0.2 * (labels - 4)[:, None, None, None], labels


def batches(part: tuple[Tensor, Tensor], size: int = 16) -> Iterator[list[Tensor]]:
    for both in zip(part[0].split(size), part[1].split(size), strict=True):
        yield list(both)


def features(model: LocalWrapper, pixels: Tensor) -> list[Tensor]:
    model.backbone.eval()
    found = []
    with torch.no_grad():
        for stage in model.backbone:
            pixels = stage(pixels)
            found.append(pixels.mean(dim=(2, 3)).clone())
    model.backbone.train()
    return found


@pytest.mark.parametrize("folder", [False, True])
def test_one_pass_gives_what_all_features_in_memory_give(folder: bool, tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model, train, test = wrapped(), images(100), images(50)
    flip = lambda pixels: pixels.flip(3) + 0.1 * torch.rand_like(pixels)  # noqa: E731
    report = stage_quality(
        model, batches(train), batches(test), k=5, augment=flip, folder=tmp_path / "kept" if folder else None
    )
    assert (report.train, report.test, report.knn_from, report.linear_from, report.uniformity_from) == (
        100,
        50,
        100,
        100,
        50,
    )
    for stage, known, queries in zip(report.stages, features(model, train[0]), features(model, test[0]), strict=True):
        guesses = measures.vote(queries, known, train[1] - 4, 5) + 4
        assert stage.knn == float((guesses == test[1]).double().mean())
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(known.numpy(), train[1].numpy())
        assert stage.linear == pytest.approx(probe.score(queries.numpy(), test[1].numpy()))
        assert stage.effective_rank == pytest.approx(effective_rank(known), rel=1e-5)
        assert stage.uniformity == pytest.approx(measures.uniformity(queries))
        assert stage.alignment is not None
        assert 0 < stage.alignment < 1
    assert report.stages[0].knn > 0.6  # chance is a third
    assert not folder or list((tmp_path / "kept").iterdir()) == []


def test_with_a_folder_all_images_vote_and_a_sample_is_fitted_to(tmp_path: Path) -> None:
    model, train, test = wrapped(), images(100), images(20)
    some = stage_quality(model, batches(train), batches(test), sample=30)
    rest = stage_quality(model, batches(train), batches(test), sample=30, folder=tmp_path)
    assert (some.knn_from, some.linear_from, rest.knn_from, rest.linear_from) == (30, 30, 100, 30)
    assert "kNN votes among a random 30 of 100 training images, the probe has a random 30 of 100" in str(some)
    assert "kNN votes among all 100 training images" in str(rest)
    assert [stage.effective_rank for stage in some.stages] == [stage.effective_rank for stage in rest.stages]


def test_memory_does_not_grow_with_the_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Live bytes as the second half of either set goes by are those of the first half."""
    from locallearn.memory.count import LiveBytes

    model, live = wrapped(), LiveBytes()
    peaks: list[int] = []

    def endless(count: int) -> Iterator[tuple[Tensor, Tensor]]:
        for at in range(count):
            if at % 10 == 0:
                peaks.append(max(live.history))
                live.history[:] = live.history[-1:]
            yield images(32)

    monkeypatch.setattr(quality, "_PAIRED", 40)
    with live:
        stage_quality(model, endless(60), endless(60), sample=50, linear_probe=False)
    train, test = peaks[2:6], peaks[8:12]
    assert len(peaks) == 12
    assert len(set(train)) == 1
    assert len(set(test)) == 1


def test_everything_stays_as_it_was() -> None:
    model, train, test = wrapped(), images(40), images(20)
    model.local_step(*torch.rand(2, 4, 3, 6, 6))
    model.backbone[1].eval()
    before = state_of(model)

    def shuffled(part: tuple[Tensor, Tensor]) -> Iterator[list[Tensor]]:
        order = torch.randperm(len(part[0]))
        np.random.rand()  # noqa: NPY002 - as augmentations do
        yield from batches((part[0][order], part[1][order]))

    stage_quality(model, shuffled(train), shuffled(test), augment=lambda x: x + torch.rand_like(x))
    assert_same(model, before)
    other = deepcopy(model)
    linear_cka(model, other, batches(test))
    with pytest.raises(ValueError, match="train has no images"):
        stage_quality(model, [], batches(test))
    assert_same(model, before)


def test_tokens_and_vectors_of_ones_own() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 7), nn.Linear(7, 7)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(tokens)))

    model = LocalWrapper(Tokens(), ["one", "two"], decoder=TokenDecoder, example=torch.rand(2, 9, 5))
    tokens, labels = torch.rand(30, 9, 5), torch.arange(30) % 2
    report = stage_quality(model, [(tokens, labels)], [(tokens, labels)], k=1)
    assert [(stage.width, stage.knn) for stage in report.stages] == [(7, 1), (7, 1)]
    assert report.stages[0].effective_rank == pytest.approx(
        effective_rank(model.backbone.one(tokens).mean(dim=1)), rel=1e-6
    )
    own = stage_quality(model, [(tokens, labels)], [(tokens, labels)], k=1, pool=lambda outlet: outlet[:, 0])
    assert own.stages[0].effective_rank == pytest.approx(effective_rank(model.backbone.one(tokens)[:, 0]), rel=1e-6)
    with pytest.raises(ValueError, match=r"pool= makes vectors \(N, C\).*returned shape \(30, 9, 7\)"):
        stage_quality(model, [(tokens, labels)], [(tokens, labels)], pool=lambda outlet: outlet)


def test_it_prints_saves_and_gives_plain_numbers(tmp_path: Path) -> None:
    report = stage_quality(wrapped(), batches(images(30)), batches(images(20)), linear_probe=False)
    lines = str(report).splitlines()
    assert len(lines) == 5
    assert lines[1].split()[0] == "0"
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["stages"][2]["knn"] == report.stages[2].knn
    assert plain["stages"][0]["linear"] is None
    report.save(tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("batch", "problem", "message"),
    [
        (lambda x: x, TypeError, r"train yields batches \(images, labels\).*got a Tensor"),
        (lambda x: (x, [1, 2]), TypeError, r"got a tuple of \['Tensor', 'list'\]"),
        (lambda x: (x, torch.rand(4)), ValueError, "one whole number per image; train has labels of shape"),
        (lambda x: (x, torch.arange(3)), ValueError, r"shape \(3,\) and torch.int64 for a batch of shape"),
        (lambda x: (x, torch.zeros(4, dtype=torch.long)), ValueError, "the training labels have only one"),
    ],
)
def test_other_batches_are_refused(batch: Callable[[Tensor], Any], problem: type[Exception], message: str) -> None:
    with pytest.raises(problem, match=message):
        stage_quality(wrapped(), [batch(torch.rand(4, 3, 6, 6))], batches(images(9)))


def test_other_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in ({"k": 0}, {"sample": 0}, {"temperature": 0.0}, {"temperature": torch.nan}):
        with pytest.raises(
            ValueError, match=rf"{next(iter(arguments))}.* is a .*number, (at least 1|more than 0); got"
        ):
            stage_quality(wrapped(), batches(images(9)), batches(images(9)), **arguments)
    for arguments in ({"k": 2.5}, {"sample": "x"}, {"temperature": "x"}):
        with pytest.raises(TypeError, match=rf"{next(iter(arguments))}.* is a .*number, (at least 1|more than 0); got"):
            stage_quality(wrapped(), batches(images(9)), batches(images(9)), **arguments)
    with pytest.raises(TypeError, match="got Sequential"):
        stage_quality(wrapped().backbone, batches(images(9)), batches(images(9)))
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn, or say linear_probe=False"):
        stage_quality(wrapped(), batches(images(9)), batches(images(9)))


# ----------------------------------------------------------------------------------------------------------- similarity


def cka(one: Tensor, other: Tensor) -> float:
    """By the matrices of images, as the paper has it."""
    n = len(one)
    centre = torch.eye(n) - 1 / n
    grams = [centre @ (x @ x.T) @ centre for x in (one, other)]
    return float((grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm()))


def test_linear_cka_is_that_of_all_images_at_once(tmp_path: Path) -> None:
    model, other, part = wrapped(), wrapped(), images(60)
    report = linear_cka(model, other, (pixels for pixels in part[0].split(7)))
    for row, one in zip(report.cka, features(model, part[0]), strict=True):
        for value, two in zip(row, features(other, part[0]), strict=True):
            assert value == pytest.approx(cka(one, two), rel=1e-7)
    assert report.images == 60
    same = linear_cka(model, model, batches(part))
    assert [same.cka[k][k] for k in range(3)] == pytest.approx([1, 1, 1])
    assert len(str(report).splitlines()) == 4
    assert json.loads(json.dumps(report.as_dict()))["cka"] == [list(row) for row in report.cka]
    report.save(tmp_path / "cka.png")
    assert (tmp_path / "cka.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("part", ["train", "test"])
def test_features_that_are_not_finite_are_refused_with_their_stage(part: str) -> None:
    pixels, classes = images(9)
    broken = pixels.clone()
    broken[2] = torch.nan
    sets = {"train": [(pixels, classes)], "test": [(pixels, classes)], part: [(broken, classes)]}
    with pytest.raises(
        ValueError, match=r"features of stage 0, which ends after '0', are not finite for 1 of 9 images"
    ):
        stage_quality(wrapped(), **sets, linear_probe=False)
    with pytest.raises(ValueError, match=r"features of stage 0.* not finite"):
        linear_cka(wrapped(), wrapped(), [broken])


def test_similarity_needs_images_that_differ() -> None:
    one = images(1)[0]
    with pytest.raises(ValueError, match="got one image, and needs two or more"):
        linear_cka(wrapped(), wrapped(), [one])
    with pytest.warns(RuntimeWarning, match=r"same for all images.* the first model's '0', .* the other model's '0'"):
        report = linear_cka(wrapped(), wrapped(), [one.expand(7, *one.shape[1:]), one])
    assert all(value != value for row in report.cka for value in row)


def test_similarity_needs_images() -> None:
    with pytest.raises(ValueError, match="batches has no images"):
        linear_cka(wrapped(), wrapped(), [])
    with pytest.raises(TypeError, match=r"batches are images, or \(images, labels\); got a str"):
        linear_cka(wrapped(), wrapped(), ["image"])
