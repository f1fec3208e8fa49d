"""Batches on their way to the device: random views to train on, plain images to read out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from inputs.image_sets import DataError, Folder, Images, square
from inputs.simclr import SimCLRViews
from inputs.views import Views

Step = tuple[int, Tensor]  # a seed, from which all that is random in the step comes, and the images' indices (N,)
Colour = float | Sequence[float]  # of all channels, or one of each

RESIZED = 8 / 7  # an ImageNet image is resized to 256 pixels before the 224 in its middle are cut out
RESIDENT = 1 / 4  # of a GPU's free memory: the images that may stay there
ON_DEVICE = 2**31  # added to a step's seed where the device continues what a worker began


def view_batches(
    images: Images | Folder,
    steps: Sequence[Step],
    view: Views,
    device: torch.device,
    views: int = 2,
    workers: int = 0,
    augment_on: Literal["device", "worker"] = "device",
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """For each step `views` random views of its training images, `(N, 3, S, S)` each, and their labels, on `device`.

    A step's views depend on its seed and its indices, and on nothing before it: a run that is resumed sees the same ones.
    Images in memory are augmented by batches on the device, or with `augment_on="worker"` in `workers` processes. Files are
    decoded by the workers; with `augment_on="device"` these cut SimCLR's crops, and the device does the rest.
    """
    if isinstance(images, Images) and augment_on == "device":
        yield from _from_memory(images, steps, view, device, views)
        return
    finish = view.finish if augment_on == "device" and isinstance(view, SimCLRViews) else None
    for seed, made, labels in loaded(_Steps(images, view, views, finish is None), steps, workers, device):
        on_device = [pixels.to(device, non_blocking=True) for pixels in made]
        with seeded(seed + ON_DEVICE, device):
            seen = on_device if finish is None else [finish(crops) for crops in on_device]
        yield seen, labels.to(device, non_blocking=True)


def plain_batches(
    images: Images | Folder,
    part: Literal["train", "test"],
    batch_size: int,
    device: torch.device,
    mean: Colour = 0.5,
    std: Colour = 0.5,
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images of a part in order, `(N, 3, S, S)`, as (x - mean) / std with x in 0..1, and their labels, on `device`.

    Files are resized to 8/7 of the size, and the middle is cut out.
    """
    labels = images.train_labels if part == "train" else images.test_labels
    batches = torch.arange(len(labels)).split(batch_size)
    if isinstance(images, Images):
        source = images.train if part == "train" else images.test
        pixels = (source[batch] for batch in batches)
    else:
        pixels = loaded(_Squares(images, part), batches, workers, device)
    for uint8, batch in zip(pixels, batches, strict=True):
        x = rgb(uint8.to(device, non_blocking=True).float() / 255)
        yield normalised(x, mean, std), labels[batch].to(device)


def normalised(x: Tensor, mean: Colour, std: Colour) -> Tensor:
    """(x - mean) / std, channel by channel."""
    return (x - x.new_tensor(mean).view(-1, 1, 1)) / x.new_tensor(std).view(-1, 1, 1)


def rgb(pixels: Tensor) -> Tensor:
    """Grey images get the three channels that the backbones take."""
    return pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from `seed` within, and afterwards those that would have come without it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _from_memory(
    images: Images, steps: Sequence[Step], view: Views, device: torch.device, views: int
) -> Iterator[tuple[list[Tensor], Tensor]]:
    source = images.train
    if device.type == "cuda" and source.nbytes < RESIDENT * torch.cuda.mem_get_info(device)[0]:
        source = source.to(device)  # once, instead of each batch every epoch
    for seed, indices in steps:
        batch = source[indices.to(source.device)].to(device)
        with seeded(seed, device):
            seen = [rgb(view(batch)) for _ in range(views)]
        yield seen, images.train_labels[indices].to(device)


@dataclass(frozen=True)
class _Steps(Dataset[tuple[int, list[Tensor], Tensor]]):
    """Whole steps, each made by one worker; `complete` but for what SimCLR's views leave to the device."""

    images: Images | Folder
    view: Views
    views: int
    complete: bool

    def __getitem__(self, step: Step) -> tuple[int, list[Tensor], Tensor]:
        seed, indices = step
        with seeded(seed, torch.device("cpu")):
            return seed, self._views(indices), self.images.train_labels[indices]

    def _views(self, indices: Tensor) -> list[Tensor]:
        if isinstance(self.images, Images):
            batch = self.images.train[indices]
            return [rgb(self.view(batch)) for _ in range(self.views)]
        originals = [self.images.read("train", index) for index in indices.tolist()]
        if not isinstance(self.view, SimCLRViews):
            return [torch.cat([self.view(image.unsqueeze(0)) for image in originals]) for _ in range(self.views)]
        crops = [torch.stack([self.view.crop(image) for image in originals]) for _ in range(self.views)]
        return [self.view.finish(pixels) for pixels in crops] if self.complete else crops


@dataclass(frozen=True)
class _Squares(Dataset[Tensor]):
    """Batches of whole images, resized and cut square, uint8."""

    folder: Folder
    part: str

    def __getitem__(self, indices: Tensor) -> Tensor:
        size = self.folder.size
        whole = [self.folder.read(self.part, index) for index in indices.tolist()]
        return torch.stack([square(image, size, round(size * RESIZED)) for image in whole])


@dataclass(frozen=True)
class _HandedOver(Dataset[object]):
    """Hands over what is wrong with the data in an item's place: raised in a worker, it would come with that one's traceback."""

    source: Dataset[object]

    def __getitem__(self, item: object) -> object:
        try:
            return self.source[item]
        except DataError as problem:
            return problem


def loaded(source: Dataset[object], items: Sequence[object], workers: int, device: torch.device) -> Iterator[Any]:
    """`source[item]` for each of the items in order, made by `workers` processes. Raises `DataError` where it does."""
    loader = DataLoader(
        _HandedOver(source),
        batch_size=None,  # an item is a whole batch already
        sampler=items,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # otherwise the loader takes its workers' seeds from the caller's random numbers
    )
    for made in loader:
        if isinstance(made, DataError):
            raise made
        yield made
