"""Instances on their way to the detector: batches to train on, single images to detect in."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from inputs.images import DataError
from inputs.loading import loaded
from instances import InstanceSet, Photo, boxes_of, labels_of, masks_of
from torch import Tensor
from torch.utils.data import Dataset

Targets = list[dict[str, Tensor]]
TRIES = 10  # images in a row that may be broken


def trainable(photos: Sequence[Photo]) -> list[Photo]:
    """Those with an instance that is no crowd; COCO's tools, too, train on no others."""
    return [photo for photo in photos if photo.told_apart]


def training_batches(
    photos: Sequence[Photo], steps: Sequence[tuple[int, Tensor]], device: torch.device, workers: int
) -> Iterator[tuple[list[Tensor], Targets]]:
    """For each step its images, `(3, H, W)` in 0..1, each mirrored with probability 1/2, and their instances.

    A step depends on its seed and its indices alone. In the place of an image that cannot be read comes the next one, and a
    line on stderr names it.
    """
    for images, targets, broken in loaded(_Steps(photos), steps, workers, device):
        for problem in broken:
            print(f"warning: {problem}; another image is taken", file=sys.stderr)
        moved = [{name: value.to(device, non_blocking=True) for name, value in target.items()} for target in targets]
        yield [_floats(image, device) for image in images], moved


def images_to_detect(
    found: InstanceSet, device: torch.device, workers: int, first: int = 0, every: int = 1
) -> Iterator[tuple[Photo, Tensor | None]]:
    """Images `first`, `first + every`, ... in order, `(3, H, W)` in 0..1; `None` where the file cannot be read."""
    indices = range(first, len(found.photos), every)
    for index, (pixels, problem) in zip(indices, loaded(_Files(found.photos), indices, workers, device), strict=True):
        if problem:
            print(f"warning: {problem}; nothing is detected in it", file=sys.stderr)
        yield found.photos[index], None if problem else _floats(pixels, device)


@dataclass(frozen=True)
class _Steps(Dataset[tuple[list[Tensor], Targets, list[str]]]):
    photos: Sequence[Photo]

    def __getitem__(self, step: tuple[int, Tensor]) -> tuple[list[Tensor], Targets, list[str]]:
        seed, indices = step
        mirrored = torch.rand(len(indices), generator=torch.Generator().manual_seed(seed)) < 0.5
        images, targets, broken = [], [], []
        for index, mirror in zip(indices.tolist(), mirrored.tolist(), strict=True):
            photo, image = self._readable(index, broken)
            instances = photo.told_apart
            boxes, masks = boxes_of(instances), masks_of(instances, photo)
            if mirror:
                image, masks = image.flip(2), masks.flip(2)
                boxes[:, [0, 2]] = photo.width - boxes[:, [2, 0]]
            images.append(image)
            targets.append({"boxes": boxes, "labels": labels_of(instances), "masks": masks})
        return images, targets, broken

    def _readable(self, index: int, broken: list[str]) -> tuple[Photo, Tensor]:
        for other in range(index, index + TRIES):
            photo = self.photos[other % len(self.photos)]
            try:
                return photo, photo.read()
            except DataError as problem:
                broken.append(str(problem))
        raise DataError(f"{TRIES} images in a row cannot be read, the last one: {broken[-1]}")


@dataclass(frozen=True)
class _Files(Dataset[tuple[Tensor, str]]):
    photos: Sequence[Photo]

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            return self.photos[index].read(), ""
        except DataError as problem:
            return torch.empty(0), str(problem)


def _floats(image: Tensor, device: torch.device) -> Tensor:
    return image.to(device, non_blocking=True).float() / 255
