"""Cityscapes: the polygons of gtFine as instances of its own eight classes.

As its own scripts do, polygons are painted in the order of the file, and what is painted over belongs to what hides it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import extra
import numpy as np
from faster_coco_eval.core import mask as coco_mask
from inputs.images import DataError
from instances import Instance, InstanceSet, Photo, Problems
from PIL import Image, ImageDraw
from tqdm import tqdm

CLASSES = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
GROUPS = ("human", "human", *6 * ["vehicle"])
# Painted, since they hide what is behind them, and not told apart; "license plate" alone is not painted.
OTHERS = {
    *(
        "unlabeled",
        "ego vehicle",
        "rectification border",
        "out of roi",
        "static",
        "dynamic",
        "ground",
        "road",
        "sidewalk",
    ),
    *("parking", "rail track", "building", "wall", "fence", "guard rail", "bridge", "tunnel", "pole", "polegroup"),
    *("traffic light", "traffic sign", "vegetation", "terrain", "sky", "caravan", "trailer"),
}
SUFFIX = "_gtFine_polygons.json"


def read_cityscapes(directory: Path, part: str, skip_missing: bool = True) -> InstanceSet:
    """Read `gtFine/PART/CITY/*_gtFine_polygons.json` with `leftImg8bit/PART/CITY/*_leftImg8bit.png`.

    A group ("cargroup") becomes a crowd. What is broken is left out, and counted in `.problems`; a missing image is, too, or
    refused.
    """
    root = directory / "gtFine" / part
    files = sorted(root.glob(f"*/*{SUFFIX}"))
    if not files:
        raise DataError(f"{directory} is not laid out as Cityscapes is: there is no {root}/CITY/*{SUFFIX}")
    problems, photos = Problems(), []
    for file in tqdm(files, desc=f"polygons of {part}", unit="image", delay=2, leave=False, disable=None):
        name = file.name.removesuffix(SUFFIX)
        path = directory / "leftImg8bit" / part / file.parent.name / f"{name}_leftImg8bit.png"
        if not path.is_file():
            if not skip_missing:
                raise DataError(f"{path} is missing")
            problems.add("images missing: left out", path)
            continue
        try:
            contents = json.loads(file.read_text())
            height, width = int(contents["imgHeight"]), int(contents["imgWidth"])
            objects = list(contents["objects"])
        except (OSError, ValueError, KeyError, TypeError):
            problems.add("files of polygons that cannot be read: their images are left out", file)
            continue
        photos.append(Photo(name, path, height, width, tuple(_instances(objects, height, width, problems, name))))
    if not any(photo.told_apart for photo in photos):
        raise DataError(f"no image of {root} is left that has an instance; {'; '.join(problems.lines())}")
    return InstanceSet(f"cityscapes {part}", CLASSES, GROUPS, tuple(photos), problems)


def _instances(objects: list[Any], height: int, width: int, problems: Problems, photo: str) -> list[Instance]:
    canvas = Image.new("I", (width, height))
    painted: list[tuple[int, bool]] = []  # label and whether it is a crowd; the n-th paints n + 1, all others 0
    for thing in objects:
        try:
            name, deleted, polygon = thing["label"], thing.get("deleted", 0), [tuple(p) for p in thing["polygon"]]
            if deleted or name == "license plate":
                continue
            if len(polygon) < 3:
                problems.add("polygons of fewer than three points: left out", f"{name} of {photo}")
                continue
            found = _label(name)
            ImageDraw.Draw(canvas).polygon(polygon, fill=len(painted) + 1 if found else 0)
        except (KeyError, TypeError, ValueError, AttributeError):
            problems.add("polygons that cannot be read: left out", f"one of {photo}")
            continue
        if found:
            painted.append(found)
        elif name not in OTHERS:
            problems.add("polygons of an unknown label: taken as background", f"{name} of {photo}")
    owner = np.asarray(canvas)
    result = []
    for number, (label, crowd) in enumerate(painted, start=1):
        mask = owner == number
        if not mask.any():
            problems.add("instances that are hidden or out of the image: left out", f"{CLASSES[label - 1]} of {photo}")
            continue
        rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
        box = tuple(float(side) for side in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        result.append(Instance(box, label, packed, float(mask.sum()), crowd))
    return result


def _label(name: str) -> tuple[int, bool] | None:
    """A class's label, and whether the name is a group's; `None` for what is none of the eight."""
    single = name.removesuffix("group")
    return (CLASSES.index(single) + 1, single != name) if single in CLASSES else None
