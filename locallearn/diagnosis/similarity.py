"""Do two networks represent images alike, stage by stage? Linear CKA."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from locallearn.diagnosis.measures import Moments
from locallearn.diagnosis.picture import panels, write
from locallearn.diagnosis.reading import Pool, stage_vectors
from locallearn.wrapper import LocalWrapper


@dataclass(frozen=True)
class StageSimilarity:
    """What :func:`linear_cka` has found; ``print`` it, or ``save`` it as a picture.

    Attributes:
        rows: the submodules after which the stages of the first model end.
        columns: those of the other one.
        cka: the similarity of each pair, from 0 to 1; nan where the features of one of them are the same for all images.
        images: how many there were.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cka: tuple[tuple[float, ...], ...]
    images: int

    def __str__(self) -> str:
        lines = [f"{'linear CKA':24}" + "".join(f" {name:>12}" for name in self.columns)]
        lines += [
            f"{name:24}" + "".join(f" {x:>12.3f}" for x in row) for name, row in zip(self.rows, self.cka, strict=True)
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, as ``json.dump`` takes them."""
        return asdict(self)

    def save(self, path: str | PathLike[str], names: tuple[str, str] = ("the first model", "the other model")) -> None:
        """Draws the table, with ``names`` for the models.

        Raises:
            ModuleNotFoundError: without matplotlib.
            ValueError: for a format that matplotlib does not have.
        """
        wide = 2.6 + 0.9 * len(self.columns), 2.0 + 0.7 * len(self.rows)
        figure, (panel,) = panels("StageSimilarity.save", "Do their stages see alike?", size=wide)
        shown = panel.imshow(self.cka, cmap="viridis", vmin=0, vmax=1)
        panel.set_xticks(range(len(self.columns)), self.columns, rotation=20, horizontalalignment="right")
        panel.set_yticks(range(len(self.rows)), self.rows)
        panel.set(xlabel=f"stages of {names[1]}", ylabel=f"stages of {names[0]}")
        for row, values in enumerate(self.cka):
            for column, value in enumerate(values):
                ink = "white" if value < 0.6 else "black"
                panel.annotate(f"{value:.2f}", (column, row), color=ink, ha="center", va="center")
        figure.colorbar(shown, ax=panel, label="linear CKA")
        write(figure, "StageSimilarity.save", path)


def linear_cka(
    model: LocalWrapper, other: LocalWrapper, batches: Iterable[Any], *, pool: Pool | None = None
) -> StageSimilarity:
    """How alike the features of the stages of two models are: linear CKA of every pair, in one pass.

    With ``X`` and ``Y`` the features of the same images, columns centred, it is
    ``|Y^T X|^2 / (|X^T X| |Y^T Y|)`` in Frobenius norms (Kornblith et al., 2019): 1 for features that a rotation and a scale
    turn into each other, near 0 for unrelated ones, of which there need to be many more than channels.

    Only products of channels are kept, in double precision, so memory does not grow with the images. Features are as in
    :func:`stage_quality`.

    Args:
        model: a wrapped backbone.
        other: another one, or the same.
        batches: images ``(N, ...)``, or ``(images, labels)``, of which the labels are not looked at.
        pool: as in :func:`stage_quality`.

    Raises:
        TypeError: for batches of another kind, or a model that is not wrapped.
        ValueError: for fewer than two images, or features that are not finite.

    Warns:
        RuntimeWarning: if a stage's features are the same for all images: its similarities are nan.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
        >>> model = LocalWrapper(net, [1, 2], decoder=torch.nn.LazyLinear, example=torch.rand(2, 4))
        >>> round(linear_cka(model, model, [torch.eye(4)]).cka[0][0], 6)
        1.0
    """
    with stage_vectors(model, pool) as mine, stage_vectors(other, pool) as theirs:
        cross = [[Moments() for _ in other.stages] for _ in model.stages]
        selves = [[Moments() for _ in wrapped.stages] for wrapped in (model, other)]
        images = 0
        for batch in batches:
            inputs = batch[0] if isinstance(batch, list | tuple) and batch else batch
            if not isinstance(inputs, Tensor | tuple | Mapping):
                raise TypeError(f"batches are images, or (images, labels); got a {type(inputs).__name__}")
            found = mine(inputs), theirs(inputs)
            images += len(found[0][0])
            for known, rows in zip(selves, found, strict=True):
                for moments, one in zip(known, rows, strict=True):
                    moments.add(one)
            for line, one in zip(cross, found[0], strict=True):
                for moments, two in zip(line, found[1], strict=True):
                    moments.add(one, two.to(one.device))
    if not images:
        raise ValueError("batches has no images. A generator that was used before is empty: make a new one")
    if images < 2:
        raise ValueError(
            "linear CKA compares how features change from image to image; got one image, and needs two or more"
        )
    constant = [[moments.constant() for moments in known] for known in selves]
    if wrong := [
        f"{which} model's {name!r}"
        for which, wrapped, flags in zip(("first", "other"), (model, other), constant, strict=True)
        for name, flag in zip(wrapped.stages, flags, strict=True)
        if flag
    ]:
        warnings.warn(
            f"features are the same for all images, so linear CKA is nan, after the {', the '.join(wrong)}",
            RuntimeWarning,
            stacklevel=2,
        )
    norms = [
        [0.0 if flag else float(moments.centred().norm()) for moments, flag in zip(known, flags, strict=True)]
        for known, flags in zip(selves, constant, strict=True)
    ]
    table = [
        [_ratio(float(moments.centred().square().sum()), a * b) for moments, b in zip(line, norms[1], strict=True)]
        for line, a in zip(cross, norms[0], strict=True)
    ]
    return StageSimilarity(model.stages, other.stages, tuple(map(tuple, table)), images)


def _ratio(shared: float, own: float) -> float:
    """The quotient, at most 1; nan where one of them does not change from image to image."""
    return min(shared / own, 1.0) if own > torch.finfo(torch.float64).tiny else torch.nan
