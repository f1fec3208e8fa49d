"""Few labels: random subsets of COCO's training images, `python examples/detection/splits.py --data data/coco`.

Table 3 trains on COCO-10K and COCO-1K, 10,000 and 1,000 images of train2017, five random subsets each. The paper's own lists
are not published; these follow from the seed alone, whatever the order of the images in the file, and the smaller is part of
the larger. Writes COCO-10K-seed0.json, ... to `--out`, for `train.py --split`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import stoppable

from coco import check_ids, parts
from command_line import Parser, at_least, status_of, write
from inputs.images import DataError


def subset(ids: list[int], size: int, seed: int) -> list[int]:
    """The first `size` of a random order of the ids, sorted."""
    if size > len(ids):
        raise DataError(f"there are {len(ids)} images, too few for a subset of {size}")
    return sorted(random.Random(seed).sample(sorted(ids), len(ids))[:size])


def name_of(size: int) -> str:
    return f"COCO-{size // 1000}K" if size % 1000 == 0 else f"COCO-{size}"


def run(args: argparse.Namespace) -> None:
    path = args.json or parts(args.data)["train"][1]
    try:
        ids = [image["id"] for image in json.loads(path.read_text())["images"]]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise DataError(
            f"{path} is not written like COCO's: it must hold a list `images`, each with an id"
        ) from problem
    check_ids(ids, "images", path)
    args.out.mkdir(parents=True, exist_ok=True)
    for size in args.sizes:
        for seed in range(args.seeds):
            name = f"{name_of(size)}-seed{seed}"
            contents = {"name": name, "of": path.name, "seed": seed, "images": subset(ids, size, seed)}
            target = args.out / f"{name}.json"
            write(target, lambda unfinished, contents=contents: unfinished.write_text(json.dumps(contents) + "\n"))
            print(f"wrote {target}: {size} of {len(ids)} images")


def parser() -> Parser:
    result = Parser(
        description="Choose random subsets of COCO's training images.",
        epilog="example: python examples/detection/splits.py --data data/coco --out splits",
    )
    add = result.add_argument
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, metavar="DIR", help="in COCO's layout")
    source.add_argument("--json", type=Path, metavar="JSON", help="any file in COCO's format")
    add("--sizes", type=at_least(1), nargs="+", default=[10_000, 1_000], metavar="N", help="images (10000 1000)")
    add("--seeds", type=at_least(1), default=5, metavar="N", help="subsets of each size (%(default)s)")
    add("--out", type=Path, default=Path("splits"), metavar="DIR", help="(%(default)s)")
    return result


def main(argv: list[str] | None = None) -> int:
    return status_of(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
