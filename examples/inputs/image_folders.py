"""Data sets in directories of image files: Imagenette, Tiny ImageNet, ImageNet, and anyone's own folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms import v2
from tqdm import tqdm

from inputs.image_sets import DataError, Folder, Images, decoded

MEMORY = 2**31  # bytes; a set whose decoded images take more stays in its files
SIZE = 64  # pixels, where nothing else is asked for
IMAGENETTE = {160: ("160px", "imagenette2-160"), 320: ("320px", "imagenette2-320"), 9999: ("full", "imagenette2")}
TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"

Part = tuple[list[str], Tensor]  # paths of images, labels (N,)


def imagenette(directory: Path, download: bool, size: int | None) -> Images | Folder:
    """`imagenette2-160`, `imagenette2-320` or `imagenette2` in `directory`: the smallest there that has `size` pixels."""
    size = size or 96
    large_enough = [release for pixels, release in IMAGENETTE.items() if pixels >= size]
    there = [release for release in large_enough if (directory / release[1]).is_dir()]
    release, folder = (there or large_enough)[0]
    if not there:
        if not download:
            raise DataError(f"imagenette is not in {directory} (no {folder}); add --download, or say where: --data-dir")
        try:
            datasets.Imagenette(directory, size=release, download=True)
        except (OSError, RuntimeError) as problem:
            raise DataError(f"imagenette cannot be had ({problem})") from problem
    return gathered("imagenette", size, *two_folders(directory / folder / "train", directory / folder / "val"))


def tiny_imagenet(directory: Path, download: bool, size: int | None) -> Images | Folder:
    """Stanford's `tiny-imagenet-200` in `directory`: `train/CLASS/images/*`, `val/images/*`, `val/val_annotations.txt`."""
    root = directory / "tiny-imagenet-200"
    if not root.is_dir():
        if not download:
            raise DataError(
                f"tiny-imagenet is not in {directory} (no {root.name}); add --download, or say where: --data-dir"
            )
        try:
            download_and_extract_archive(TINY_IMAGENET, str(directory), md5=TINY_IMAGENET_MD5)
        except (OSError, RuntimeError) as problem:
            raise DataError(f"tiny-imagenet cannot be had ({problem})") from problem
    train = _folder(root / "train")
    try:
        lines = [line.split("\t") for line in (root / "val/val_annotations.txt").read_text().splitlines()]
        labels = torch.tensor([train.class_to_idx[line[1]] for line in lines])
    except (OSError, LookupError) as problem:
        raise DataError(f"{root} is not laid out as tiny-imagenet is: val/val_annotations.txt ({problem})") from problem
    paths = [str(root / "val/images" / line[0]) for line in lines]
    return gathered("tiny-imagenet", size or 64, _part(train), (paths, labels))


def imagenet(directory: Path, size: int | None) -> Folder:
    """`train/CLASS/*` and `val/CLASS/*` in `directory` or its `imagenet`, or the published archives to unpack there."""
    root = next((path for path in (directory / "imagenet", directory) if path.is_dir()), None)
    if root is None:
        raise DataError(f"there is no directory {directory} (--data-dir) to find imagenet in")
    if not all((root / part).is_dir() for part in ("train", "val")):
        try:
            for split in ("train", "val"):
                datasets.ImageNet(root, split)  # unpacks
        except (OSError, RuntimeError) as problem:
            reason = " ".join(str(problem).split())
            raise DataError(
                f"imagenet is not in {root}: neither train/ and val/ nor its archives ({reason})"
            ) from problem
    train, test = two_folders(root / "train", root / "val")
    return Folder("imagenet", size or 224, *train, *test)


def image_folder(path: Path, size: int | None) -> Images | Folder:
    """`path/train/CLASS/*` and `path/val` or `path/test`; where `path` holds the classes, every fifth image is held out.

    A folder of images and no folders has no labels: all are of class 0.
    """
    if not path.is_dir():
        raise DataError(f"there is no directory {path}")
    held_out = next((path / part for part in ("val", "test") if (path / part).is_dir()), None)
    if held_out is not None and (path / "train").is_dir():
        return gathered(path.name, size or SIZE, *two_folders(path / "train", held_out))
    paths, labels = _flat(path) or _part(_folder(path))
    fifth = torch.arange(len(labels)) % 5 == 4
    train, test = (([paths[i] for i in chosen.nonzero().flatten()], labels[chosen]) for chosen in (~fifth, fifth))
    return gathered(path.name, size or SIZE, train, test)


def two_folders(train: Path, test: Path) -> tuple[Part, Part]:
    parts = _folder(train), _folder(test)
    if parts[0].classes != parts[1].classes:
        raise DataError(f"{train} and {test} must have the same classes")
    return _part(parts[0]), _part(parts[1])


def gathered(name: str, size: int, train: Part, test: Part) -> Images | Folder:
    """The images in memory, resized to `size` and cut square, or where that is too much, in their files."""
    if (len(train[0]) + len(test[0])) * 3 * size**2 > MEMORY:
        return Folder(name, size, *train, *test)
    return Images(name, _pixels(train[0], size), train[1], _pixels(test[0], size), test[1])


def _flat(path: Path) -> Part | None:
    entries = sorted(path.iterdir())
    paths = [str(entry) for entry in entries if entry.suffix.lower() in datasets.folder.IMG_EXTENSIONS]
    if not paths or any(entry.is_dir() for entry in entries):
        return None
    return paths, torch.zeros(len(paths), dtype=torch.long)


def _folder(path: Path) -> datasets.ImageFolder:
    try:
        return datasets.ImageFolder(path)
    except OSError as problem:
        raise DataError(f"{path} is no folder of images: {str(problem).splitlines()[0]}") from problem


def _part(folder: datasets.ImageFolder) -> Part:
    return [path for path, _ in folder.samples], torch.tensor(folder.targets)


def _pixels(paths: Sequence[str], size: int) -> Tensor:
    square = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    pixels = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    progress = tqdm(paths, desc="decoding", unit="image", leave=False, dynamic_ncols=True, delay=2, disable=None)
    for place, path in zip(pixels, progress, strict=True):
        place.copy_(square(decoded(path)))
    return pixels
