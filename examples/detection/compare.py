r"""Several backbones under the same detector: the same data, budget and seeds, one table.

    python examples/detection/compare.py SimCLR=runs/simclr GIM=runs/gim LoCo=runs/loco random --seeds 3 \
        --out runs/detection -- --data data/coco --mode frozen --schedule 1x

What follows `--` goes to train.py, for every backbone. A backbone is a run of pretrain.py, `random` (of the same
architecture), or a name of torchvision's weights such as IMAGENET1K_V1 ("supervised"), each with a name of its own in front
if you like. `{seed}` in the path of a run is 0, 1, ...: LoCo=runs/loco-{seed} has one pretraining for each seed of the
detector. Runs that are finished are not repeated, unfinished ones go on. Writes comparison.json to `--out`, and prints a
table for the screen and one in markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import stoppable

import train
from backbones import named
from command_line import Parser, at_least, status_of
from inputs.images import DataError
from pretraining.runs import read_settings
from reports import markdown, print_results, save_json

OWN = ("--out", "--resume", "--seed", "--arch", "--weights", "--random")


def start_of(backbone: str, arch: str) -> list[str]:
    """train.py's arguments for a backbone."""
    if (Path(backbone) / "run.json").exists() or Path(backbone).is_file():
        return [backbone]
    return ["--arch", arch, "--random"] if backbone == "random" else ["--arch", arch, "--weights", backbone]


def run(args: argparse.Namespace) -> None:
    if taken := [option for option in OWN if option in args.rest]:
        raise DataError(f"{taken[0]} is chosen by compare.py for each backbone: leave it out after --")
    given = [given.rpartition("=") for given in args.backbones]
    named = [(name or Path(path).name.replace("-{seed}", ""), path) for name, _, path in given]
    if len({name for name, _ in named}) < len(named):
        raise DataError("two backbones have the same name: give them as NAME=RUN")
    of_seed_0 = [Path(path.replace("{seed}", "0")) for _, path in named]
    first = next((path for path in of_seed_0 if (path / "run.json").exists()), None)
    like = read_settings(first) if first else {"arch": "resnet50"}
    arch = args.arch or like["arch"]
    small = ["--image-size", str(like["image_size"])] if first and arch == like["arch"] else []
    rows = []
    for seed in range(args.seeds):
        for name, path in named:
            out = args.out / f"{name}-seed{seed}"
            print(f"{name}, seed {seed}", file=sys.stderr)
            start = start_of(path.replace("{seed}", str(seed)), arch) + (small if path == "random" else [])
            status = train.main([*start, *args.rest, "--seed", str(seed), "--out", str(out), "--resume", "auto"])
            if status:
                raise KeyboardInterrupt
            rows.append(json.loads((out / "results.json").read_text()) | {"backbone": name})
            save_json(args.out / "comparison.json", rows)
    print_results(rows)
    print(markdown(rows))


def parser() -> Parser:
    result = Parser(
        description="Train the same detector on several backbones.",
        epilog="example: python examples/detection/compare.py SimCLR=runs/simclr LoCo=runs/loco random -- --data data/coco",
    )
    add = result.add_argument
    add(
        "backbones",
        nargs="+",
        metavar="BACKBONE",
        help="a run, whose path may hold {seed}; random; a name of torchvision's weights; or NAME=...",
    )
    add("--arch", type=named, metavar="NAME", help="of random and torchvision's weights (the first run's, or resnet50)")
    add("--seeds", type=at_least(1), default=1, metavar="N", help="runs of each backbone (%(default)s)")
    add("--out", type=Path, default=Path("runs/detection"), metavar="DIR", help="(%(default)s)")
    return result


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    arguments = parser()
    arguments.set_defaults(rest=argv[cut + 1 :])
    return status_of(arguments, run, argv[:cut], "stopped; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
