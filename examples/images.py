"""Data sets as plain tensors in memory: images to train on and images held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2

# The digits' file is ordered by the person who wrote them; from this image on come the last four of its writers.
FIRST_HELD_OUT_DIGIT = 1287

TORCHVISION = {
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
    "stl10": datasets.STL10,
    "fashion-mnist": datasets.FashionMNIST,
}
NAMES = "digits, cifar10, cifar100, stl10, fashion-mnist, imagefolder:PATH or npz:PATH"


class DataError(Exception):
    """A data set that cannot be had, in one line: what was asked for, and what to do."""


@dataclass(frozen=True)
class Images:
    """A data set in memory: square uint8 images `(N, C, S, S)` in 0..255 and labels `(N,)` from 0."""

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    def __post_init__(self) -> None:
        for part, pixels, labels in (
            ("train", self.train, self.train_labels),
            ("test", self.test, self.test_labels),
        ):
            if len(pixels) != len(labels) or not len(pixels):
                raise DataError(f"{self.name} has {len(pixels)} {part} images and {len(labels)} labels for them")
            if pixels.shape[1] not in (1, 3) or pixels.shape[1] != self.train.shape[1]:
                raise DataError(f"{self.name}: images must all have 1 channel or all 3; {part} has {pixels.shape[1]}")
            if labels.min() < 0:
                raise DataError(f"{self.name}: {part} labels must count from 0; the least is {labels.min()}")

    @property
    def channels(self) -> int:
        return self.train.shape[1]

    @property
    def size(self) -> int:
        return self.train.shape[-1]

    @property
    def classes(self) -> int:
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1


def load(name: str, directory: Path = Path("data"), download: bool = False, size: int | None = None) -> Images:
    """Load the data set `name`, its images resized to `size` pixels a side (None: as they are; folders 64).

    `directory` is where torchvision keeps its files. Raises `DataError` where there is nothing to load.
    """
    kind, _, path = name.partition(":")
    if download and kind not in TORCHVISION:
        raise DataError(f"--download is for {', '.join(TORCHVISION)}; {kind} has nothing to download")
    if name == "digits":
        return _digits(size)
    if name in TORCHVISION:
        return _resized(_torchvision(name, directory, download), size)
    if kind == "imagefolder" and path:
        return _imagefolder(Path(path), size or 64)
    if kind == "npz" and path:
        return _resized(_npz(Path(path)), size)
    raise DataError(f"unknown data set {name!r}: choose {NAMES}")


def _digits(size: int | None) -> Images:
    """scikit-learn's 1,797 handwritten digits, 8x8; the held-out ones are by people who wrote none of the others."""
    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)  # (N, 1, 8, 8), 0..16 in the file
    labels = torch.from_numpy(digits.target).long()
    images = Images(
        "digits",
        pixels[:FIRST_HELD_OUT_DIGIT],
        labels[:FIRST_HELD_OUT_DIGIT],
        pixels[FIRST_HELD_OUT_DIGIT:],
        labels[FIRST_HELD_OUT_DIGIT:],
    )
    return _resized(images, size)


def _torchvision(name: str, directory: Path, download: bool) -> Images:
    dataset = TORCHVISION[name]
    if not directory.is_dir() and not download:
        raise DataError(f"there is no directory {directory} (--data-dir) to find {name} in; --download makes it")
    train, test = ({"split": s} if name == "stl10" else {"train": s == "train"} for s in ("train", "test"))
    try:
        parts = [dataset(directory, download=download, **part) for part in (train, test)]
    except (OSError, RuntimeError, AssertionError, EOFError, ValueError) as problem:
        reason = str(problem).split(". ")[0]  # the next sentence is on torchvision's arguments
        advice = "" if download else "; add --download, or say where it is with --data-dir"
        raise DataError(f"{name} cannot be read from {directory} ({reason}){advice}") from problem
    return Images(name, *(half for part in parts for half in (_pixels(part.data), _labels(part))))


def _pixels(data: Tensor | np.ndarray) -> Tensor:
    """Grey `(N, H, W)`, channels last or channels first, as torchvision's classes keep them -> `(N, C, H, W)`."""
    pixels = torch.as_tensor(data)
    if pixels.ndim == 3:
        return pixels.unsqueeze(1)
    return pixels.permute(0, 3, 1, 2).contiguous() if pixels.shape[-1] in (1, 3) else pixels


def _labels(dataset: datasets.VisionDataset) -> Tensor:
    return torch.as_tensor(dataset.labels if isinstance(dataset, datasets.STL10) else dataset.targets).long()


def _imagefolder(path: Path, size: int) -> Images:
    """`path/train/CLASS/*` and `path/val` or `path/test`; where `path` holds the classes, every fifth image is held out."""
    if not path.is_dir():
        raise DataError(f"there is no directory {path}")
    held_out = next((path / part for part in ("val", "test") if (path / part).is_dir()), None)
    square = v2.Compose([v2.PILToTensor(), v2.Resize(size), v2.CenterCrop(size)])
    try:
        if held_out is None or not (path / "train").is_dir():
            pixels, labels = _stacked(datasets.ImageFolder(path, square))
            fifth = torch.arange(len(labels)) % 5 == 4
            return Images(path.name, pixels[~fifth], labels[~fifth], pixels[fifth], labels[fifth])
        train, test = (datasets.ImageFolder(part, square) for part in (path / "train", held_out))
    except (FileNotFoundError, OSError) as problem:
        raise DataError(f"{path} is no folder of images: {str(problem).splitlines()[0]}") from problem
    if train.classes != test.classes:
        raise DataError(f"{path / 'train'} and {held_out} must have the same classes")
    return Images(path.name, *_stacked(train), *_stacked(test))


def _stacked(folder: datasets.ImageFolder) -> tuple[Tensor, Tensor]:
    pixels, labels = zip(*folder, strict=True)
    return torch.stack(pixels), torch.tensor(labels)


def _npz(path: Path) -> Images:
    """Arrays x_train, x_test (uint8, `(N, H, W, C)` or `(N, H, W)`) and y_train, y_test (integers from 0)."""
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in names if name in file}
    except (OSError, ValueError, EOFError) as problem:
        raise DataError(f"{path} cannot be read as an .npz file ({problem})") from problem
    if missing := [name for name in names if name not in arrays]:
        raise DataError(f"{path} must hold {', '.join(names)}; it lacks {', '.join(missing)}")
    for name in ("x_train", "x_test"):
        if arrays[name].dtype != np.uint8 or arrays[name].ndim not in (3, 4):
            raise DataError(f"{path}: {name} must be uint8 (N, H, W, C), not {arrays[name].dtype} {arrays[name].shape}")
    x_train, x_test = (_pixels(arrays[name]) for name in ("x_train", "x_test"))
    y_train, y_test = (torch.from_numpy(arrays[name]).long().flatten() for name in ("y_train", "y_test"))
    return Images(path.stem, x_train, y_train, x_test, y_test)


def _resized(images: Images, size: int | None) -> Images:
    """Square, `size` a side, uint8."""
    size = size or min(images.train.shape[-2:])
    resize: Callable[[Tensor], Tensor] = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    train, test = (resize(part).round().clamp(0, 255).to(torch.uint8) for part in (images.train, images.test))
    return Images(images.name, train, images.train_labels, test, images.test_labels)
