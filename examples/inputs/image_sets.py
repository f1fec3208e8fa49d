"""What a data set is to the examples: images to train on and images held out, in memory or in files."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

MOST_CLASSES = 10**6  # a label beyond is none: each class gets weights where a classifier is trained
LONGEST = 16  # times the shorter side, of an image that is resized as a whole


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
    remarks: tuple[str, ...] = ()  # on what was left out

    def __post_init__(self) -> None:
        for part, pixels, labels in (
            ("train", self.train, self.train_labels),
            ("test", self.test, self.test_labels),
        ):
            if not len(pixels):
                raise DataError(f"{self.name} has no {part} images: it must have at least one")
            if len(pixels) != len(labels):
                raise DataError(f"{self.name} has {len(pixels)} {part} images and {len(labels)} labels for them")
            if pixels.shape[1] not in (1, 3) or pixels.shape[1] != self.train.shape[1]:
                raise DataError(f"{self.name}: images must all have 1 channel or all 3; {part} has {pixels.shape[1]}")
            if labels.min() < 0:
                raise DataError(f"{self.name}: {part} labels must count from 0; the least is {labels.min()}")
            if labels.max() >= MOST_CLASSES:
                raise DataError(f"{self.name}: {part} labels must count from 0; the largest is {labels.max()}")

    @property
    def channels(self) -> int:
        return self.train.shape[1]

    @property
    def size(self) -> int:
        return self.train.shape[-1]

    @property
    def classes(self) -> int:
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1

    @property
    def mark(self) -> str:
        """How many images there are to train on, and a checksum of their pixels: other images have another mark."""
        return f"{len(self.train)} ({zlib.crc32(self.train.contiguous().numpy()):08x})"

    def holding_out(self, indices: Tensor) -> Images:
        """The same data set with only these of the images held out."""
        return replace(self, test=self.test[indices], test_labels=self.test_labels[indices])


@dataclass(frozen=True)
class Folder:
    """A data set too large for memory: files that are decoded when they are needed, to be seen at `size` pixels a side."""

    name: str
    size: int
    train_paths: list[str]
    train_labels: Tensor
    test_paths: list[str]
    test_labels: Tensor
    remarks: tuple[str, ...] = ()
    channels = 3

    @property
    def classes(self) -> int:
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1

    @property
    def mark(self) -> str:
        """How many images there are to train on, and a checksum of their names, each with its folder's."""
        names = "\n".join("/".join(Path(path).parts[-2:]) for path in self.train_paths)
        return f"{len(self.train_paths)} ({zlib.crc32(os.fsencode(names)):08x})"

    def holding_out(self, indices: Tensor) -> Folder:
        """The same data set with only these of the images held out."""
        paths = [self.test_paths[i] for i in indices.tolist()]
        return replace(self, test_paths=paths, test_labels=self.test_labels[indices])

    def read(self, part: str, index: int) -> Tensor:
        """One image of "train" or "test" as it is in its file, uint8 RGB `(3, H, W)`."""
        return decoded((self.train_paths if part == "train" else self.test_paths)[index])


def decoded(path: str | Path, *, upright: bool = True) -> Tensor:
    """An image file's pixels, turned as its EXIF data say or as they lie in the file, uint8 RGB `(3, H, W)`."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise OSError("it is no file")  # but a pipe, say, which would be waited for
        with Image.open(path) as image:
            turned = ImageOps.exif_transpose(image) if upright else image
            return v2.functional.pil_to_tensor(_eight_bits(turned).convert("RGB"))
    except Exception as problem:  # Pillow lets through whatever its decoders stumble over
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise DataError(f"{path} is no image that can be read ({reason})") from problem


def square(image: Tensor, size: int, resized: int | None = None) -> Tensor:
    """The middle of an image, `(3, size, size)`, after its shorter side was resized to `size`, or to `resized` pixels."""
    if max(image.shape[1:]) > LONGEST * min(image.shape[1:]):  # resized as a whole it would fill the memory
        image = v2.functional.center_crop(
            image, [min(side, LONGEST * min(image.shape[1:])) for side in image.shape[1:]]
        )
    return v2.functional.center_crop(v2.functional.resize(image, [resized or size], antialias=True), [size])


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits from 0..65535, and of floats from 0..1 (or 0..255), to 0..255; Pillow would cut what is above 255."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image, dtype=np.float64)
    most = 65535 if image.mode != "F" else 1 if values.max() <= 1 else 255
    if not (values.min() >= 0 and values.max() <= most):  # nan too
        raise ValueError(f"its values reach from {values.min():g} to {values.max():g}; expected 0 to {most}")
    return Image.fromarray((values * (255 / most)).round().astype(np.uint8))
