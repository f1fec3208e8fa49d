"""Data sets in directories of image files: Imagenette, Tiny ImageNet, ImageNet, and anyone's own folder per class."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.datasets.utils import download_and_extract_archive
from tqdm import tqdm

from inputs.image_sets import DataError, Folder, Images, decoded, square
from inputs.loading import loaded

MEMORY = 2**31  # bytes; a set whose decoded images take more stays in its files
SIZE = 64  # pixels, where nothing else is asked for
IMAGENETTE = {160: ("160px", "imagenette2-160"), 320: ("320px", "imagenette2-320"), 9999: ("full", "imagenette2")}
TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"

NAMED = 3  # images of those that are left out
ENDINGS = datasets.folder.IMG_EXTENSIONS

T = TypeVar("T")

Part = tuple[list[str], Tensor]  # paths of images, labels (N,)
OnBroken = Literal["stop", "skip"]


class Found(NamedTuple):
    """A data set in its files, to be seen at `size` pixels a side; `remarks` tell what of them is left out."""

    name: str
    size: int
    train: Part
    test: Part
    remarks: tuple[str, ...] = ()


class Labelled(NamedTuple):
    """The images of a folder; `classes` are the names of the folders in it."""

    part: Part
    classes: tuple[str, ...]
    remarks: tuple[str, ...] = ()


def imagenette(directory: Path, download: bool, size: int | None) -> Found:
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
    return two_folders("imagenette", size, directory / folder / "train", directory / folder / "val")


def tiny_imagenet(directory: Path, download: bool, size: int | None) -> Found:
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
    train = labelled(root / "train")
    try:
        lines = [line.split("\t") for line in (root / "val/val_annotations.txt").read_text().splitlines()]
        labels = torch.tensor([train.classes.index(line[1]) for line in lines])
    except (OSError, LookupError, ValueError) as problem:
        raise DataError(f"{root} is not laid out as tiny-imagenet is: val/val_annotations.txt ({problem})") from problem
    paths = [str(root / "val/images" / line[0]) for line in lines]
    return Found("tiny-imagenet", size or 64, train.part, (paths, labels))


def imagenet(directory: Path, size: int | None) -> Found:
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
    return two_folders("imagenet", size or 224, root / "train", root / "val")


def image_folder(path: Path, size: int | None) -> Found:
    """`path/train/CLASS/*` and `path/val` or `path/test`; where `path` holds the classes, every fifth image is held out.

    A folder of images, none of them in folders within, has no labels: all are of class 0.
    """
    if not path.is_dir():
        raise DataError(f"there is no directory {path}")
    name, size = path.name if path.name not in ("", "..") else path.resolve().name, size or SIZE
    held_out = next((path / part for part in ("val", "test") if (path / part).is_dir()), None)
    if held_out is not None and (path / "train").is_dir():
        return two_folders(name, size, path / "train", held_out)
    (paths, labels), _, remarks = labelled(path)
    if len(paths) < 5:
        raise DataError(
            f"{path} has {len(paths)} images, too few to train on four fifths of them and hold out the rest"
        )
    fifth = torch.arange(len(labels)) % 5 == 4
    train, test = (([paths[i] for i in chosen.nonzero().flatten()], labels[chosen]) for chosen in (~fifth, fifth))
    return Found(name, size, train, test, remarks)


def two_folders(name: str, size: int, train: Path, test: Path) -> Found:
    parts = labelled(train), labelled(test)
    if parts[0].classes != parts[1].classes:
        raise DataError(f"{train} and {test} must have the same classes")
    return Found(name, size, parts[0].part, parts[1].part, parts[0].remarks + parts[1].remarks)


def labelled(path: Path) -> Labelled:
    """Images by the folders of `path` in which they lie, each a class; where they all lie in `path` itself, of one class."""
    try:
        entries = sorted(path.iterdir())
    except OSError as problem:
        raise DataError(f"{path} is no folder that can be read: {problem.strerror or problem}") from problem
    beside = [str(entry) for entry in entries if _is_image(entry.name) and not entry.is_dir()]
    within = {entry.name: _images_in(entry) for entry in entries if entry.is_dir() and not _hidden(entry.name)}
    if not any(within.values()):
        if not beside:
            raise DataError(f"{path} holds no images, nor do its folders: none ends with {', '.join(ENDINGS)}")
        return Labelled((beside, torch.zeros(len(beside), dtype=torch.long)), ())
    if empty := [name for name, paths in within.items() if not paths]:
        raise DataError(f"{path}: every folder is a class, and there are no images in {', '.join(empty)}: move it away")
    labels = [label for label, paths in enumerate(within.values()) for _ in paths]
    remark = f"{len(beside)} images lie beside the folders of {path}, which are its classes, and are left out ({_some(beside)})"
    remark += ": move them into one, or all images into one folder"
    paths = [path for paths in within.values() for path in paths]
    return Labelled((paths, torch.tensor(labels)), tuple(within), (remark,) if beside else ())


def _images_in(folder: Path) -> list[str]:
    """All images in a folder and in those within it, in order; none twice where links lead in circles."""
    found, seen = [], set()

    def refuse(problem: OSError) -> None:
        raise problem

    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if (place := Path(root).resolve()) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not _hidden(name))
        found += [(root, name) for name in files if _is_image(name)]
    return [str(Path(root, name)) for root, name in sorted(found)]


def _is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS) and not _hidden(name)


def _hidden(name: str) -> bool:
    """Whether a file is none that anybody put there: macOS leaves a `._NAME` beside every NAME, and `__MACOSX` in archives."""
    return name.startswith(".") or name == "__MACOSX"


def _some(paths: Sequence[str]) -> str:
    return ", ".join([*(Path(path).name for path in paths[:NAMED]), *(["..."] if len(paths) > NAMED else [])])


# ------------------------------------------------------------------------------------------------------------- decoding


def gathered(found: Found, on_broken: OnBroken, workers: int, *, in_files: bool = False) -> Images | Folder:
    """The images in memory, resized to their size and cut square; or in their files, where that is too much or asked for.

    Those that cannot be read are left out with `on_broken="skip"`: to know them, files are all read once. Otherwise an image
    in its file is refused when it is read.
    """
    name, size, train, test, remarks = found
    in_files = in_files or (len(train[0]) + len(test[0])) * 3 * size**2 > MEMORY
    if in_files and on_broken == "stop":
        return Folder(name, size, *train, *test, remarks)
    broken: list[str] = []
    if in_files:
        parts = [_readable(part, workers, broken) for part in (train, test)]
    else:
        parts = [_pixels(part, size, broken if on_broken == "skip" else None) for part in (train, test)]
    for place, (images, _) in zip(("train", "test"), parts, strict=True):
        if not len(images):
            raise DataError(f"{name}: none of the {place} images can be read, such as {broken[0]}")
    if broken:
        count = len(train[0]) + len(test[0])
        remarks += (f"{len(broken)} of {count} images of {name} cannot be read and are left out ({_some(broken)})",)
    (x, y), (x_test, y_test) = parts
    if in_files:
        return Folder(name, size, x, y, x_test, y_test, remarks)
    return Images(name, x, y, x_test, y_test, remarks)


def _pixels(part: Part, size: int, broken: list[str] | None) -> tuple[Tensor, Tensor]:
    """Pixels and labels; paths of images that cannot be read are added to `broken`, which without one are refused."""
    paths, labels = part
    pixels = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    kept: list[int] = []
    for number, path in enumerate(_told(paths, "decoding")):
        try:
            pixels[len(kept)] = square(decoded(path), size)
        except DataError:
            if broken is None:
                raise
            broken.append(path)
        else:
            kept.append(number)
    return pixels[: len(kept)], labels[kept]


def _readable(part: Part, workers: int, broken: list[str]) -> Part:
    """Those that can be read; paths of the others are added to `broken`."""
    paths, labels = part
    fine = list(
        _told(loaded(_CanBeRead(paths), range(len(paths)), workers, torch.device("cpu")), "reading", len(paths))
    )
    broken += [path for path, good in zip(paths, fine, strict=True) if not good]
    return [path for path, good in zip(paths, fine, strict=True) if good], labels[torch.tensor(fine)]


@dataclass(frozen=True)
class _CanBeRead(Dataset[bool]):
    paths: list[str]

    def __getitem__(self, index: int) -> bool:
        try:
            decoded(self.paths[index])
        except DataError:
            return False
        return True


def _told(each: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    return tqdm(each, what, total, unit="image", leave=False, dynamic_ncols=True, delay=2, disable=None)
