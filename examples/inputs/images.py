"""Data sets by name, read from wherever they are: images to train on and images held out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from zipfile import is_zipfile

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2

from inputs.image_folders import OnBroken, gathered, image_folder, imagenet, imagenette, tiny_imagenet
from inputs.image_sets import DataError, Folder, Images

# The digits' file is ordered by the person who wrote them; from this image on come the last four of its writers.
FIRST_HELD_OUT_DIGIT = 1287

TORCHVISION = {
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
    "stl10": datasets.STL10,
    "fashion-mnist": datasets.FashionMNIST,
}
DOWNLOADABLE = (*TORCHVISION, "imagenette", "tiny-imagenet")
NAMES = f"digits, {', '.join(DOWNLOADABLE)}, imagenet, imagefolder:PATH or npz:PATH"


def load(
    name: str,
    directory: Path = Path("data"),
    download: bool = False,
    size: int | None = None,
    on_broken: OnBroken = "stop",
    workers: int = 0,
) -> Images | Folder:
    """Load the data set `name`, its images resized to `size` pixels a side.

    `size=None` leaves them as they are; of folders it makes 64 pixels, of imagenette 96, of imagenet 224. A path to a folder
    or to an .npz file may stand without its prefix. `directory` is where torchvision keeps its files. What would take more
    than 2 GiB comes as a `Folder`, all else as `Images`. With `on_broken="skip"` image files that cannot be read are left out,
    which `.remarks` tell; those of a `Folder` are all read once to know them, by `workers` processes. Raises `DataError` where
    there is nothing to load.
    """
    kind, path = _kind(name)
    if download and kind not in DOWNLOADABLE:
        raise DataError(f"--download is for {', '.join(DOWNLOADABLE)}; {kind} has nothing to download")
    if name == "digits":
        return _digits(size)
    if name in TORCHVISION:
        return _resized(_torchvision(name, directory, download), size)
    if name == "imagenette":
        return gathered(imagenette(directory, download, size), on_broken, workers)
    if name == "tiny-imagenet":
        return gathered(tiny_imagenet(directory, download, size), on_broken, workers)
    if name == "imagenet":
        return gathered(imagenet(directory, size), on_broken, workers, in_files=True)
    if kind == "imagefolder" and path:
        return gathered(image_folder(Path(path), size), on_broken, workers)
    if kind == "npz" and path:
        return _resized(_npz(Path(path)), size)
    raise DataError(f"unknown data set {name!r}: choose {NAMES}")


def with_labels(images: Images | Folder) -> Images | Folder:
    """The images, where there is something to read out; raises `DataError` where there is not."""
    if problem := without_labels(images):
        raise DataError(problem)
    return images


def without_labels(images: Images | Folder) -> str | None:
    """Why there is nothing to read out: all are of one class, or some are held out of one that cannot be learnt."""
    if images.classes < 2:
        return f"{images.name} has no labels, or one class only: say which labelled images to read out with --data"
    known = {*images.train_labels.unique().tolist()}
    if unknown := [label for label in images.test_labels.unique().tolist() if label not in known]:
        return (
            f"{images.name}: no training image has the label {_some(unknown)}, as held-out ones do: give some to train "
            "on, or leave those out"
        )
    return None


def _some(labels: list[int]) -> str:
    return ", ".join([*map(str, labels[:5]), *(["..."] if len(labels) > 5 else [])])


def tell(images: Images | Folder) -> Images | Folder:
    """The images, after stderr has been told what was left out of them."""
    for remark in images.remarks:
        print(f"warning: {remark}", file=sys.stderr)
    return images


def _kind(name: str) -> tuple[str, str]:
    """A name's kind and, where it has one, its path: `photos/` -> imagefolder and photos."""
    kind, _, path = name.partition(":")
    if kind in ("imagefolder", "npz"):
        return kind, path
    if name.endswith(".npz"):
        return "npz", name
    if os.sep in name or (name not in ("digits", "imagenet", *DOWNLOADABLE) and Path(name).is_dir()):
        return "imagefolder", name
    return name, ""


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


def _npz(path: Path) -> Images:
    """Arrays x_train, x_test (uint8, `(N, H, W, C)` or `(N, H, W)`) and y_train, y_test (integers from 0)."""
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        with path.open("rb") as opened:
            if not is_zipfile(opened):
                raise DataError(f"{path} cannot be read as an .npz file (it is none, or cut short)")
            opened.seek(0)
            with np.load(opened) as file:
                arrays = {name: _array(path, file, name) for name in names if name in file}
    except DataError:
        raise
    except Exception as problem:  # a damaged archive fails wherever it is read: in zipfile, in zlib, in numpy
        raise DataError(f"{path} cannot be read as an .npz file ({problem})") from problem
    if missing := [name for name in names if name not in arrays]:
        raise DataError(f"{path} must hold {', '.join(names)}; it lacks {', '.join(missing)}")
    for name in ("x_train", "x_test"):
        dtype, shape = arrays[name].dtype, arrays[name].shape
        if dtype != np.uint8 or len(shape) not in (3, 4) or 0 in shape[1:]:
            raise DataError(f"{path}: {name} must be uint8 (N, H, W, C), not {dtype} {shape}")
        if len(shape) == 4 and not {shape[1], shape[-1]} & {1, 3}:
            raise DataError(f"{path}: {name} must be uint8 (N, H, W, C) with 1 or 3 channels C, not {shape}")
    for name in ("y_train", "y_test"):
        if arrays[name].dtype.kind not in "iub":
            raise DataError(f"{path}: {name} must be whole numbers from 0, one per image, not {arrays[name].dtype}")
    x_train, x_test = (_pixels(arrays[name]) for name in ("x_train", "x_test"))
    y_train, y_test = (torch.from_numpy(arrays[name].astype(np.int64).ravel()) for name in ("y_train", "y_test"))
    return replace(Images(str(path), x_train, y_train, x_test, y_test), name=path.stem)  # errors begin with the path


def _array(path: Path, file: NpzFile, name: str) -> np.ndarray:
    """One of the arrays; Python's objects are not read, since that would run what the file says."""
    try:
        return file[name]
    except ValueError as problem:
        if "Object arrays" not in str(problem):
            raise
        raise DataError(f"{path}: {name} must hold numbers, not Python's objects (dtype object)") from problem


def _resized(images: Images, size: int | None) -> Images:
    """Square, `size` a side, uint8."""
    size = size or min(images.train.shape[-2:])
    resize: Callable[[Tensor], Tensor] = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    train, test = (resize(part).round().clamp(0, 255).to(torch.uint8) for part in (images.train, images.test))
    return Images(images.name, train, images.train_labels, test, images.test_labels)
