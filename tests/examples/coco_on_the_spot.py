"""A data set in COCO's layout, composed on the spot: coloured shapes on grey noise, of three categories in two groups."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

HEIGHT, WIDTH = 64, 80
CATEGORIES = [
    {"id": 3, "name": "disc", "supercategory": "round"},
    {"id": 7, "name": "square", "supercategory": "angular"},
    {"id": 20, "name": "triangle", "supercategory": "angular"},
]
COLOURS = {3: (220, 60, 60), 7: (60, 200, 60), 20: (70, 90, 230)}
CORNERS = {3: 16, 7: 4, 20: 3}


def shape(category: int, x: float, y: float, radius: float) -> list[float]:
    """A polygon around (x, y), as COCO writes it: x1, y1, x2, y2, ..."""
    corners = CORNERS[category]
    angles = [2 * math.pi * k / corners + math.pi / 4 for k in range(corners)]
    return [side for a in angles for side in (round(x + radius * math.cos(a), 2), round(y + radius * math.sin(a), 2))]


def annotation(number: int, image: int, category: int, polygon: list[float]) -> dict[str, Any]:
    xs, ys = polygon[::2], polygon[1::2]
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": round(0.7 * box[2] * box[3], 2),
        "iscrowd": 0,
        "segmentation": [polygon],
    }


def contents(part: str, count: int) -> dict[str, Any]:
    """What the json file of a part holds; the first image has a crowd as well."""
    draw = np.random.default_rng(len(part))
    images, annotations = [], []
    for image in range(count):
        images.append({"id": 100 + image, "file_name": f"{image}.jpg", "height": HEIGHT, "width": WIDTH})
        for k in range(2):
            category = CATEGORIES[int(draw.integers(3))]["id"]
            x, y = (20 + 40 * k + draw.uniform(-4, 4), draw.uniform(20, HEIGHT - 20))
            annotations.append(
                annotation(len(annotations) + 1, 100 + image, category, shape(category, x, y, draw.uniform(8, 16)))
            )
    crowd = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * 70, HEIGHT * 10]}  # the last ten columns
    annotations.append(
        {
            "id": len(annotations) + 1,
            "image_id": 100,
            "category_id": 7,
            "bbox": [70, 0, 10, HEIGHT],
            "area": 10 * HEIGHT,
            "iscrowd": 1,
            "segmentation": crowd,
        }
    )
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def paint(path: Path, annotations: list[dict[str, Any]], seed: int) -> None:
    noise = np.random.default_rng(seed).integers(90, 130, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    for one in annotations:
        if isinstance(one["segmentation"], list):
            ImageDraw.Draw(image).polygon(one["segmentation"][0], fill=COLOURS[one["category_id"]])
    image.save(path, quality=95)


def make(directory: Path, train: int = 6, val: int = 4) -> Path:
    """`annotations/instances_train2017.json`, `train2017/0.jpg`, ..., and the same of val2017."""
    (directory / "annotations").mkdir(parents=True)
    for part, count in (("train", train), ("val", val)):
        written = contents(part, count)
        (directory / f"annotations/instances_{part}2017.json").write_text(json.dumps(written))
        (directory / f"{part}2017").mkdir()
        for number, image in enumerate(written["images"]):
            mine = [one for one in written["annotations"] if one["image_id"] == image["id"]]
            paint(directory / f"{part}2017" / image["file_name"], mine, seed=number)
    return directory
