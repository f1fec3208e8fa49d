"""Images with their instances, boxes, classes and masks as COCO keeps them, and a tally of what is broken in a set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypedDict

import extra
import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from inputs.image_sets import DataError, decoded
from torch import Tensor

NAMED = 3  # of each kind of problem, so many are named


class Mask(TypedDict):
    """COCO's run-length encoding: pixels of background and of the instance in turn, down the columns."""

    size: tuple[int, int]  # height, width
    counts: bytes


@dataclass(frozen=True, slots=True)
class Instance:
    """One object. A crowd is a region of many that nobody told apart: not to be learned, and no mistake if detected."""

    box: tuple[float, float, float, float]  # x1, y1, x2, y2
    label: int  # from 1; 0 is the background
    mask: Mask
    area: float
    crowd: bool = False


@dataclass(frozen=True, slots=True)
class Photo:
    """An image file, the size that its annotations were made for, and its instances."""

    id: int | str
    path: Path
    height: int
    width: int
    instances: tuple[Instance, ...]

    @property
    def told_apart(self) -> tuple[Instance, ...]:
        """The instances without crowds."""
        return tuple(instance for instance in self.instances if not instance.crowd)

    def read(self) -> Tensor:
        """The pixels, uint8 `(3, H, W)`. Raises `DataError` for a file that is broken or of another size."""
        pixels = decoded(self.path, upright=False)  # as the annotations see them
        if pixels.shape[1:] != (self.height, self.width):
            found = f"{pixels.shape[2]} x {pixels.shape[1]}"
            raise DataError(f"{self.path} has {found} pixels, its annotations are for {self.width} x {self.height}")
        return pixels


def masks_of(instances: Sequence[Instance], photo: Photo) -> Tensor:
    """uint8 `(N, H, W)`, 1 where the instance is."""
    if not instances:
        return torch.zeros(0, photo.height, photo.width, dtype=torch.uint8)
    decoded = coco_mask.decode([instance.mask for instance in instances])  # (H, W, N)
    return torch.from_numpy(np.ascontiguousarray(decoded.transpose(2, 0, 1)))


def boxes_of(instances: Sequence[Instance]) -> Tensor:
    """`(N, 4)`, as x1, y1, x2, y2."""
    return torch.tensor([instance.box for instance in instances], dtype=torch.float32).reshape(-1, 4)


def labels_of(instances: Sequence[Instance]) -> Tensor:
    """`(N,)`, from 1."""
    return torch.tensor([instance.label for instance in instances], dtype=torch.int64)


class Problems:
    """What is wrong in a set, by kind, with the first few by name."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, kind: str, name: object) -> None:
        """`kind` goes on after a count: "annotations with an empty box: left out"."""
        self._names.setdefault(kind, []).append(str(name))

    @property
    def counts(self) -> dict[str, int]:
        return {kind: len(names) for kind, names in self._names.items()}

    def lines(self) -> list[str]:
        """One per kind."""
        return [
            f"{len(names)} {kind} ({', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''})"
            for kind, names in self._names.items()
        ]


@dataclass(frozen=True)
class InstanceSet:
    """A part of a data set."""

    name: str
    classes: tuple[str, ...]  # class k has label k + 1
    groups: tuple[str, ...]  # of each class, such as "vehicle" of "car"
    photos: tuple[Photo, ...]
    problems: Problems = field(default_factory=Problems)

    def merged(self, into: Literal["none", "group", "all"]) -> InstanceSet:
        """The same objects in fewer classes: their groups, or one class for all."""
        if into == "none":
            return self
        each = self.groups if into == "group" else len(self.classes) * ("object",)
        names = tuple(dict.fromkeys(each))
        label = [0, *(1 + names.index(name) for name in each)]

        def relabelled(photo: Photo) -> Photo:
            return replace(photo, instances=tuple(replace(one, label=label[one.label]) for one in photo.instances))

        return replace(self, classes=names, groups=names, photos=tuple(map(relabelled, self.photos)))
