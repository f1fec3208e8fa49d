"""COCO's layout of instances, and any json file that is written like COCO's."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import extra
from faster_coco_eval.core import mask as coco_mask
from inputs.images import DataError
from instances import Instance, InstanceSet, Mask, Photo, Problems
from tqdm import tqdm

THINNEST = 0.1  # pixels; what is thinner has no width left when a large image is made small
OUT = "left out"


class BrokenError(Exception):
    """An annotation that cannot be used: its kind of problem."""


def parts(directory: Path) -> dict[str, tuple[Path, Path]]:
    """`train` and `val` -> folder of images, json, in COCO's layout: `annotations/instances_train2017.json`, `train2017/`."""
    found = {}
    for part in ("train", "val"):
        files = sorted((directory / "annotations").glob(f"instances_{part}*.json"))
        if len(files) != 1:
            raise DataError(
                f"{directory} is not laid out as COCO is: it has {len(files)} files annotations/instances_{part}*.json, not "
                f"one; name a folder of images and a json file by --{part} instead"
            )
        found[part] = directory / files[0].stem.removeprefix("instances_"), files[0]
    return found


def read_coco(
    folder: Path, path: Path, only: Collection[int | str] | None = None, skip_missing: bool = True
) -> InstanceSet:
    """Read a json file in COCO's format whose images lie in `folder`.

    What is broken is left out, and counted in `.problems`. A missing image is, too, or refused: average precision over the
    rest compares with nobody's.

    Args:
        folder: of the images.
        path: of the json file.
        only: ids of the images to take; `None` takes all.
        skip_missing: whether images may be missing.
    """
    contents = _contents(path)
    problems = Problems()
    categories = sorted(contents["categories"], key=lambda category: category["id"])
    labels = {category["id"]: label for label, category in enumerate(categories, start=1)}
    entries = _images(contents["images"], problems, path)
    if only is not None:
        if unknown := [image for image in only if image not in entries]:
            raise DataError(f"{path} has no image {unknown[0]!r}, which the split asks for (--split)")
        entries = {image: entries[image] for image in only}
    missing = [image for image, entry in entries.items() if not (folder / entry["file_name"]).is_file()]
    if missing and not skip_missing:
        first = folder / entries[missing[0]]["file_name"]
        raise DataError(f"{len(missing)} images of {path.name} are missing, such as {first}")
    listed = {e["id"] for e in contents["images"] if isinstance(e, dict) and isinstance(e.get("id"), int | str)}
    for image in missing:
        problems.add(f"images missing in {folder}: {OUT}", entries.pop(image)["file_name"])

    instances: dict[int | str, list[Instance]] = {image: [] for image in entries}
    progress = tqdm(contents["annotations"], desc=path.stem, unit="object", delay=2, leave=False, disable=None)
    for number, annotation in enumerate(progress):
        name = annotation.get("id", f"number {number}") if isinstance(annotation, dict) else f"number {number}"
        try:
            image = _image_of(annotation, listed)
            if image in entries:
                instances[image].append(_instance(annotation, entries[image], labels))
        except BrokenError as broken:
            problems.add(f"annotations {broken}: {OUT}", name)
    photos = tuple(
        Photo(image, folder / entry["file_name"], entry["height"], entry["width"], tuple(instances[image]))
        for image, entry in entries.items()
    )
    if not any(photo.told_apart for photo in photos):
        raise DataError(
            f"no image of {path} is left that has an instance; {'; '.join(problems.lines()) or 'it is empty'}"
        )
    names = tuple(str(category["name"]) for category in categories)
    groups = tuple(str(category.get("supercategory", category["name"])) for category in categories)
    return InstanceSet(path.stem, names, groups, photos, problems)


def _contents(path: Path) -> dict[str, list[Any]]:
    try:
        contents = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise DataError(f"{path} cannot be read as json: {problem}") from problem
    keys = ("images", "annotations", "categories")
    if not isinstance(contents, dict) or not all(isinstance(contents.get(key), list) for key in keys):
        raise DataError(f"{path} is not written like COCO's: it must hold the lists {', '.join(keys)}")
    for category in contents["categories"]:
        if not isinstance(category, dict) or not {"id", "name"} <= category.keys():
            raise DataError(f"{path}: every category must have an id and a name; there is {category}")
    check_ids([category["id"] for category in contents["categories"]], "categories", path)
    if len({category["id"] for category in contents["categories"]}) < len(contents["categories"]):
        raise DataError(f"{path}: two categories have the same id")
    return contents


def check_ids(ids: list[Any], what: str, path: Path) -> None:
    """Raises `DataError` for ids of which not all can be compared."""
    if not ({type(each) for each in ids} <= {int} or {type(each) for each in ids} <= {str}):
        first = next((each for each in ids if type(each) is not type(ids[0])), ids[0])
        raise DataError(
            f"{path}: the ids of {what} must all be whole numbers, or all be text; there are {ids[0]!r} and {first!r}"
        )


def _images(listed: list[Any], problems: Problems, path: Path) -> dict[int | str, dict[str, Any]]:
    entries: dict[int | str, dict[str, Any]] = {}
    for number, entry in enumerate(listed):
        needed = {"id", "file_name", "height", "width"}
        if not isinstance(entry, dict) or not needed <= entry.keys() or not _sized(entry):
            problems.add(f"images listed without {', '.join(sorted(needed))}: {OUT}", f"number {number}")
            continue
        if entry["id"] in entries:
            raise DataError(f"{path}: two images have the id {entry['id']!r}")
        entries[entry["id"]] = entry
    return entries


def _sized(entry: dict[str, Any]) -> bool:
    named = isinstance(entry["id"], int | str) and isinstance(entry["file_name"], str)
    return named and all(isinstance(entry[side], int) and entry[side] > 0 for side in ("height", "width"))


def _image_of(annotation: Any, listed: Collection[int | str]) -> int | str:
    if not isinstance(annotation, dict):
        raise BrokenError("that are none")
    image = annotation.get("image_id")
    if not isinstance(image, int | str) or image not in listed:
        raise BrokenError("of an image that is not listed")
    return image


def _instance(annotation: dict[str, Any], entry: dict[str, Any], labels: dict[Any, int]) -> Instance:
    category = annotation.get("category_id")
    if not isinstance(category, int | str) or category not in labels:
        raise BrokenError("of an unknown category")
    box = _box(annotation.get("bbox"), entry["width"], entry["height"])
    mask = _mask(annotation.get("segmentation"), entry["height"], entry["width"])
    pixels = float(coco_mask.area(mask))
    if not pixels:
        raise BrokenError("whose mask has no pixel in the image")
    crowd = annotation.get("iscrowd") or 0
    if crowd not in (0, 1, "0", "1"):
        raise BrokenError("whose iscrowd is neither 0 nor 1")
    area = annotation.get("area")
    known = isinstance(area, int | float) and math.isfinite(area) and area > 0
    return Instance(box, labels[category], mask, float(area) if known else pixels, bool(int(crowd)))


def _box(box: Any, width: int, height: int) -> tuple[float, float, float, float]:
    """COCO's x, y, width, height -> corners within the image."""
    if not isinstance(box, list) or len(box) != 4 or not _numbers(box):
        raise BrokenError("without a box of four numbers")
    x, y, w, h = box
    x1, y1, x2, y2 = max(0.0, x), max(0.0, y), min(float(width), x + w), min(float(height), y + h)
    if x2 - x1 < THINNEST or y2 - y1 < THINNEST:
        raise BrokenError("with an empty box, or one out of the image")
    return x1, y1, x2, y2


def _mask(segmentation: Any, height: int, width: int) -> Mask:
    """COCO's polygons or run lengths, packed or not -> packed run lengths."""
    if isinstance(segmentation, list) and segmentation:
        if not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and _numbers(p) for p in segmentation):
            raise BrokenError("with a polygon of fewer than three points")
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise BrokenError("without a mask")
    if segmentation["size"] != [height, width]:
        raise BrokenError("with a mask of another size than their image")
    try:
        counts = segmentation["counts"]
        if isinstance(counts, list):
            mask = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        else:
            mask = {"size": [height, width], "counts": counts.encode()}
        coco_mask.decode(mask)  # checks it
    except (ValueError, TypeError, AttributeError, OverflowError, RuntimeError) as problem:
        raise BrokenError("with a mask whose run lengths do not fill the image") from problem
    return mask


def _numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)
