"""The images that the scripts here train on and evaluate on, by command line."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Literal

from cityscapes import read_cityscapes
from coco import check_ids, parts, read_coco
from command_line import Parser
from inputs.images import DataError
from instances import InstanceSet


def add_data_arguments(parser: Parser, *, trained: bool = False) -> None:
    """`trained`: on what is trained already, whose run tells the rest."""
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="in the layout of COCO or of Cityscapes")
    for part in ("train", "val"):
        text = f"images and a json in COCO's format, in place of DIR's {part} part"
        add(f"--{part}", type=Path, nargs=2, metavar=("IMAGES", "JSON"), help=text)
    if trained:
        return
    add("--split", type=Path, metavar="JSON", help="train on the images that splits.py chose")
    text = "of the objects: as they are, their groups (COCO's supercategories), or one for all (%(default)s)"
    add("--merge", choices=["none", "group", "all"], default="none", help=f"classes {text}")


def load_part(args: argparse.Namespace, part: Literal["train", "val"], tell: bool = True) -> InstanceSet:
    """The part that the arguments name; what is broken in it is told on stderr. Raises `DataError` in one line."""
    chosen = getattr(args, part)
    only = read_split(args.split) if part == "train" and args.split else None
    complete = part == "val"  # precision over a part of the images compares with nobody's
    if chosen is None and args.data is None:
        raise DataError(f"there is nothing to take images from: give --data DIR, or --{part} IMAGES JSON")
    if chosen is None and (args.data / "gtFine").is_dir():
        if only is not None:
            raise DataError("--split is for COCO's images, Cityscapes has none")
        found = read_cityscapes(args.data, part, skip_missing=not complete)
    else:
        folder, file = chosen or parts(args.data)[part]
        found = read_coco(folder, file, only, skip_missing=not complete)
    if tell:
        for line in found.problems.lines():
            print(f"warning: {found.name}: {line}", file=sys.stderr)
    return found.merged(args.merge)


def read_split(path: Path) -> list[int | str]:
    """The ids in a list of splits.py."""
    try:
        ids = list(json.loads(path.read_text())["images"])
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise DataError(f"{path} is no list of splits.py") from problem
    check_ids(ids, "images", path)
    return ids
