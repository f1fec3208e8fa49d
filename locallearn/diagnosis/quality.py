"""How good are the features of every stage? A vote of neighbours, a linear probe, and how the features lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from math import inf
from numbers import Real
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from locallearn.diagnosis.kept import OnDisk, Sample
from locallearn.diagnosis.measures import Moments, alignment, single, uniformity, vote
from locallearn.diagnosis.picture import colour, panels, write
from locallearn.diagnosis.reading import Pool, labelled, stage_vectors
from locallearn.plan import whole
from locallearn.testing.copies import replayed
from locallearn.wrapper import LocalWrapper

_PAIRED = 2048  # test images between all pairs of which uniformity is measured


@dataclass(frozen=True)
class StageFeatures:
    """One stage's row of a :class:`StageQuality`.

    Attributes:
        ends_after: the submodule after which the stage ends.
        width: of its vectors.
        knn: test accuracy in 0..1 of a weighted vote of the nearest training images.
        linear: test accuracy in 0..1 of a linear probe; ``None`` without one.
        effective_rank: of the training images' vectors, from 1 to ``width``.
        alignment: mean squared distance between two views of a test image on the unit sphere; ``None`` without views.
        uniformity: of test images on the unit sphere: 0 in a point, near -4 where even.
    """

    ends_after: str
    width: int
    knn: float
    linear: float | None
    effective_rank: float
    alignment: float | None
    uniformity: float


@dataclass(frozen=True)
class StageQuality:
    """What :func:`stage_quality` has found; ``print`` it, or ``save`` it as a picture.

    Attributes:
        stages: from the lowest to the top one.
        train: how many training images there were; the effective rank is of all of them.
        test: how many test images; both accuracies are of all of them.
        knn_from: how many training images voted.
        linear_from: how many the probe was fitted to.
        uniformity_from: how many test images the uniformity is of.
    """

    stages: tuple[StageFeatures, ...]
    train: int
    test: int
    knn_from: int
    linear_from: int
    uniformity_from: int

    def __str__(self) -> str:
        lines = [
            f"{'ends after':24} {'width':>6} {'kNN':>13} {'linear probe':>13} {'rank':>8} {'align':>7} {'uniform':>8}"
        ]
        for stage in self.stages:
            accuracies = [_percent(value, self.test) for value in (stage.knn, stage.linear)]
            aligned = "" if stage.alignment is None else f"{stage.alignment:.3f}"
            lines.append(
                f"{stage.ends_after:24} {stage.width:>6} {accuracies[0]:>13} {accuracies[1]:>13} "
                f"{stage.effective_rank:>8.1f} {aligned:>7} {stage.uniformity:>8.2f}"
            )
        lines.append(
            f"on {self.test:,} test images, ± standard error; kNN votes among {_of(self.knn_from, self.train)} training images, "
            f"the probe has {_of(self.linear_from, self.train)}; uniformity of {_of(self.uniformity_from, self.test)} test images"
        )
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, as ``json.dump`` takes them."""
        return asdict(self)

    def save(self, path: str | PathLike[str]) -> None:
        """Draws accuracy and effective rank over the stages.

        Raises:
            ModuleNotFoundError: without matplotlib.
            ValueError: for a format that matplotlib does not have.
        """
        figure, (left, right) = panels("StageQuality.save", "What does each stage know?", count=2, size=(10, 4.2))
        at, names = range(len(self.stages)), [stage.ends_after for stage in self.stages]
        accuracies: dict[str, list[float | None]] = {
            "kNN": [s.knn for s in self.stages],
            "linear probe": [s.linear for s in self.stages],
        }
        for number, (name, values) in enumerate(accuracies.items()):
            known = [(stage, value) for stage, value in enumerate(values) if value is not None]
            percent, errors = (
                [100 * value for _, value in known],
                [100 * _error(value, self.test) for _, value in known],
            )
            if known:
                left.errorbar(at, percent, errors, marker="o", capsize=3, color=colour(number), label=name)
        left.set(ylabel=f"accuracy on {self.test:,} test images, %", title="Can classes be read out?")
        left.legend()
        ranks = [stage.effective_rank for stage in self.stages]
        bars = right.bar(at, ranks, color=colour(2), width=0.6)
        right.bar_label(bars, [f"{s.effective_rank:.0f} of {s.width}" for s in self.stages], padding=2)
        right.set(ylabel="effective rank (RankMe)", title="How many directions does it use?")
        right.margins(y=0.12)
        for panel in (left, right):
            panel.set_xticks(at, names, rotation=20 if max(map(len, names)) > 8 else 0)
            panel.set_xlabel("stage that ends after")
        write(figure, "StageQuality.save", path)


def _error(accuracy: float, count: int) -> float:
    return float((accuracy * (1 - accuracy) / count) ** 0.5)


def _percent(accuracy: float | None, count: int) -> str:
    return "" if accuracy is None else f"{100 * accuracy:.1f} ± {100 * _error(accuracy, count):.1f}"


def _of(some: int, count: int) -> str:
    return f"all {count:,}" if some == count else f"a random {some:,} of {count:,}"


def stage_quality(
    model: LocalWrapper,
    train: Iterable[Any],
    test: Iterable[Any],
    *,
    k: int = 20,
    temperature: float = 0.07,
    linear_probe: bool = True,
    augment: Callable[[Any], Any] | None = None,
    pool: Pool | None = None,
    sample: int = 20_000,
    folder: str | PathLike[str] | None = None,
) -> StageQuality:
    """How good the features of every stage are, in one pass over ``train`` and one over ``test``.

    A stage's features are its :term:`outlet` averaged over positions, in eval mode, as the encoder's vector would be.
    Memory does not grow with the sets: ``sample`` random training images vote and are fitted to; with ``folder`` all of them
    vote, from the disk. What is used is said in the report. The model, and random state, are as they were afterwards.

    ===================  ==========================================================================================
    kNN                  a vote weighted by ``exp(cosine / temperature)``: Wu et al. 2018, section 3.4
    linear probe         logistic regression on standardised features, by scikit-learn
    effective rank       RankMe, Garrido et al. 2023, of all training images
    alignment            Wang & Isola 2020, between two calls of ``augment`` on all test images
    uniformity           the same, between all pairs of 2,048 test images
    ===================  ==========================================================================================

    Args:
        model: a wrapped backbone.
        train: batches ``(images, labels)``, as a DataLoader gives them; a tuple or a mapping instead of images is arguments of
            the backbone.
        test: likewise, of other images.
        k: how many neighbours vote.
        temperature: how much the nearest ones count more.
        linear_probe: whether to fit one.
        augment: makes a random :term:`view` of a batch; without it there is no alignment.
        pool: makes vectors ``(N, C)`` of what decoders read of an outlet; such as a class token, ``lambda outlet: outlet[:, 0]``.
        sample: how many training images are kept in memory.
        folder: where all training images' vectors go meanwhile, 4 bytes a number.

    Raises:
        ModuleNotFoundError: for a probe, without scikit-learn.
        TypeError: for batches of another kind, a model that is not wrapped, settings of another kind.
        ValueError: for sets without images, labels that are not one whole number per image, settings out of range, features
            that are not finite.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
        >>> model = LocalWrapper(net, [1, 2], decoder=torch.nn.LazyLinear, example=torch.rand(2, 4))
        >>> points = torch.cat([torch.rand(30, 4), torch.rand(30, 4) - 2])
        >>> classes = torch.arange(60) // 30
        >>> report = stage_quality(model, [(points, classes)], [(points[::7], classes[::7])], linear_probe=False)
        >>> [stage.knn for stage in report.stages]
        [1.0, 1.0]
    """
    k = whole("k, the neighbours that vote,", k, 1)
    sample = whole("sample, the training images kept in memory,", sample, 1)
    if not isinstance(temperature, Real):
        raise TypeError(f"temperature is a number, more than 0; got {temperature!r}")
    if not 0 < temperature < inf:
        raise ValueError(f"temperature is a finite number, more than 0; got {temperature}")
    with replayed():  # an import may draw random numbers
        probes = _probes() if linear_probe else None
    with ExitStack() as stack:
        vectors = stack.enter_context(stage_vectors(model, pool))
        kept, everything = Sample(sample), None
        if folder is not None:
            everything = OnDisk(stack.enter_context(_inside(Path(folder))))
        moments = [Moments() for _ in model.stages]
        for images, labels in labelled("train", train):
            found = [single(rows) for rows in vectors(images)]
            for known, rows in zip(moments, found, strict=True):
                known.add(rows)
            kept.add([*found, labels])
            if everything is not None:
                everything.add([*found, labels])
        *small, small_labels = kept.columns()
        *known_rows, known_labels = (kept if everything is None else everything).columns()
        classes, known_classes = torch.unique(known_labels, return_inverse=True)
        fitted = [probes(rows, small_labels) for rows in small] if probes is not None else None

        right, guessed, count = [0] * len(small), [0] * len(small), 0
        apart, some = [0.0] * len(small), Sample(_PAIRED, seed=1)
        for images, labels in labelled("test", test):
            found = [single(rows) for rows in vectors(images)]
            views = [vectors(augment(images)) for _ in range(2)] if augment is not None else None
            count += len(labels)
            some.add(found)
            for stage, rows in enumerate(found):
                winners = classes[vote(rows, known_rows[stage], known_classes, k, temperature).cpu()]
                right[stage] += int((winners == labels.cpu()).sum())
                if fitted is not None:
                    guessed[stage] += int((fitted[stage](rows.cpu()) == labels.cpu()).sum())
                if views is not None:
                    apart[stage] += float(alignment(views[0][stage], views[1][stage]).sum())
        paired = some.columns()
        stages = tuple(
            StageFeatures(
                name,
                small[stage].shape[1],
                right[stage] / count,
                None if fitted is None else guessed[stage] / count,
                moments[stage].effective_rank(),
                None if augment is None else apart[stage] / count,
                uniformity(paired[stage]),
            )
            for stage, name in enumerate(model.stages)
        )
        used = len(known_labels), len(small_labels), len(paired[0])
        del known_rows, known_labels  # mapped files, which some systems do not delete
    return StageQuality(stages, kept.seen, count, *used)


@contextmanager
def _inside(folder: Path) -> Iterator[Path]:
    """A folder of its own in ``folder``, which is deleted in the end."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="stage_quality-", dir=folder, ignore_cleanup_errors=True) as own:
        yield Path(own)


def _probes() -> Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]:
    """What fits a linear probe to vectors ``(N, D)`` and labels ``(N,)``, and returns its guesses for others."""
    try:
        from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - only who wants a probe needs it
        from sklearn.pipeline import make_pipeline  # noqa: PLC0415
        from sklearn.preprocessing import StandardScaler  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the linear probe is scikit-learn's, which is not installed: pip install scikit-learn, or say linear_probe=False"
        ) from error

    def fit(rows: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
        if len(torch.unique(labels)) < 2:
            raise ValueError(
                "a linear probe tells classes apart; the training labels have only one. Say linear_probe=False"
            )
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(rows.numpy(), labels.numpy())
        return lambda queries: torch.from_numpy(probe.predict(queries.numpy()))

    return fit
