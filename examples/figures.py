"""The paper's figures from your own runs, each a PNG and the data behind it as CSV.

    python examples/figures.py losses runs/simclr runs/gim runs/loco     # Figure 2: each decoder's loss over training
    python examples/figures.py tsne runs/simclr runs/gim runs/loco       # Figure 3: the encoder's vectors in the plane
    python examples/figures.py memory runs/presnet50 runs/resnet50       # Table 7, of what memory.py --out wrote
    python examples/figures.py stages runs/*                             # linear_eval.py's accuracy, stage by stage

Runs that differ in nothing but their seed are drawn as one: their mean, and how far they spread. What else they differ in
stands in their names; runs of different data are not drawn on one axis.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import stoppable

import torch
from command_line import Parser, at_least, device, status_of, write
from drawing.charts import Loss, Point, Reading, Saving, draw_losses, draw_memory, draw_stages, draw_tsne
from inputs.image_sets import DataError
from pretraining.runs import read_log
from reading.encoders import chosen, vectors
from sklearn.manifold import TSNE
from torch import Tensor

NAMES = {"simclr": "SimCLR", "gim": "Greedy InfoMax", "loco": "LoCo"}
CLASSES = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "imagenette": (
        *("tench", "English springer", "cassette player", "chain saw", "church"),
        *("French horn", "garbage truck", "gas pump", "golf ball", "parachute"),
    ),
}
TOLD_APART_BY = (  # beside the method, where runs differ in it
    *(
        "arch",
        "data",
        "images",
        "image_size",
        "overlap",
        "decoder",
        "sharing",
        "loss",
        "temperature",
        "norm",
        "sync_bn",
    ),
    *("epochs", "batch_size", "optimizer", "lr", "weight_decay", "warm_up", "amp", "accumulate", "processes"),
    *("checkpoint", "read_at", "trained_on", "read_out_epochs", "read_out_lr", "read_out_batch_size"),
)
MEASURES = {
    "fast": "logistic regression, top-1, %",
    "paper": "linear read-out by the paper's protocol, top-1, %",
    "knn": "{k} nearest neighbours, top-1, %",
}


@dataclass(frozen=True)
class Directory:
    """A run's directory, and the name under which it is drawn."""

    path: Path
    settings: dict[str, Any]
    label: str


def named(found: Sequence[tuple[Path, dict[str, Any]]]) -> list[Directory]:
    """Runs by their paths and settings: SimCLR's, GIM's, LoCo's, others; named after the method and what else differs."""

    def differs(key: str) -> bool:
        values = {(s["method"] if key == "overlap" else "", str(s[key])) for _, s in found if s.get(key) is not None}
        methods = {method for method, _ in values}  # an overlap is told where it does not follow from the method
        return len(values) > len(methods)

    differing = [key for key in TOLD_APART_BY if differs(key)]

    def label(settings: dict[str, Any]) -> str:
        method = NAMES.get(settings["method"], settings["method"])
        told = [(key, settings[key]) for key in differing if settings.get(key) not in (None, "")]
        return ", ".join([method, *(short(key, value) for key, value in told)])

    order = list(NAMES)
    runs = [Directory(path, settings, label(settings)) for path, settings in found]
    return sorted(runs, key=lambda run: order.index(m) if (m := run.settings["method"]) in order else len(order))


def short(key: str, value: Any) -> str:
    """A setting by its name, as in lr 0.1; a data set without the way to it."""
    if key == "checkpoint":
        return str(value)
    return f"{key.replace('_', ' ')} {Path(str(value).rpartition(':')[2]).stem if key == 'data' else value}"


def refuse_different(what: str, data: dict[Path, str], advice: str) -> None:
    """Raises `DataError` where the runs are not all of the same data."""
    if len(names := sorted(set(data.values()))) > 1:
        examples = ", ".join(f"{next(path for path, own in data.items() if own == name)}: {name}" for name in names)
        raise DataError(f"{what} of different data do not go on one axis ({examples}): {advice}")


def pretrained(paths: Sequence[Path]) -> list[Directory]:
    return named([(path, read_json(path / "run.json", "a run of pretrain.py", "method")) for path in paths])


def read_json(path: Path, what: str, key: str) -> dict[str, Any]:
    """What a file says, which among other things is `key`."""
    try:
        contents = json.loads(path.read_text())
        contents[key]
        return contents
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise DataError(f"{path.parent} is not {what}: it has no {path.name}, or not one of its own") from problem


def save(args: argparse.Namespace, name: str, rows: Sequence[Any], draw: Callable[[Path], None]) -> None:
    """NAME.png and NAME.csv in `--out`."""
    args.out.mkdir(parents=True, exist_ok=True)

    def write_csv(path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, asdict(rows[0]))
            writer.writeheader()
            writer.writerows(map(asdict, rows))

    write(args.out / f"{name}.csv", write_csv)
    write(args.out / f"{name}.png", draw)
    print(f"wrote {args.out / name}.png and .csv")


# ------------------------------------------------------------------------------------------------------------- figures


def losses(args: argparse.Namespace) -> None:
    """Figure 2."""
    rows = []
    runs = pretrained(args.runs)
    data = {
        run.path: " ".join(str(run.settings[key]) for key in ("data", "images") if key in run.settings) for run in runs
    }
    refuse_different("losses", data, "draw them apart")
    for run in runs:
        log = read_log(run.path)
        if not log:
            raise DataError(f"{run.path} has no log.jsonl to draw from, or an empty one")
        units = run.settings["units"]
        for line in log:
            for unit, ((first, last), loss) in enumerate(zip(units, line["losses"], strict=True)):
                place = unit, first, last, line["step"], line["epoch"]
                rows.append(Loss(run.label, str(run.path), run.settings.get("seed"), *place, loss))
    save(args, "losses", rows, partial(draw_losses, rows))


def tsne(args: argparse.Namespace) -> None:
    """Figure 3: the paper has 500 validation images of ImageNet's first ten classes, and PResNet-50's 4096-d vectors."""
    points = []
    runs = pretrained(args.runs)
    refuse_different(
        "vectors",
        {run.path: str(args.data or run.settings.get("data", "digits")) for run in runs},
        "say --data, or draw them apart",
    )
    for run in runs:
        given = dict.fromkeys(("arch", "weights")) | {"random": False, "run": run.path}
        encoder, images = chosen(argparse.Namespace(**vars(args) | given))
        images = images.holding_out(first_of_each_class(images.test_labels, args.classes, args.images))
        found, labels = vectors(args, encoder, images, "test")
        count = len(labels)
        if count < 5:
            raise DataError(f"{images.name} has {count} held-out images of its first {args.classes} classes: too few")
        perplexity = min(30, (count - 1) / 3)
        places = TSNE(init="pca", perplexity=perplexity, random_state=args.seed).fit_transform(found[-1].numpy())
        names = CLASSES.get(images.name, tuple(map(str, range(images.classes))))
        for (x, y), label in zip(places.tolist(), labels.tolist(), strict=True):
            points.append(Point(run.label, str(run.path), label, names[label], x, y))
    save(args, "tsne", points, partial(draw_tsne, points))


def first_of_each_class(labels: Tensor, classes: int, count: int) -> Tensor:
    """Indices of the first `count` images of each of the first `classes` classes."""
    return torch.cat([(labels == label).nonzero().flatten()[:count] for label in range(classes)])


def memory(args: argparse.Namespace) -> None:
    """Table 7: how much less than SimCLR's, by backbone."""
    rows = []
    found = [read_json(path / "memory.json", "a directory that memory.py --out wrote", "methods") for path in args.runs]
    settings = [tables["setting"] for tables in found]
    differing = [key for key in settings[0] if key != "arch" and len({setting.get(key) for setting in settings}) > 1]
    for tables, setting in zip(found, settings, strict=True):
        name = ", ".join([setting["arch"], *(f"{key.replace('_', ' ')} {setting.get(key)}" for key in differing)])
        for row in tables["methods"]:
            savings = row["peak_saving"], row["saved_saving"], row["saving_in_paper"]
            rows.append(Saving(name, row["method"], *savings))
    save(args, "memory", rows, partial(draw_memory, rows))


def stages(args: argparse.Namespace) -> None:
    """Accuracy over depth."""
    results = {path: read_out(path, args) for path in args.runs}
    refuse_different(
        "read-outs",
        {path: f"{read['data']}, {read['test']} held out" for path, read in results.items()},
        "choose by --data, or draw them apart",
    )
    depths = longest({path: read["stages"] for path, read in results.items()})
    k = number_of_neighbours(args, results) if args.measure == "knn" else None
    readings = []
    for run in named([(path, differences(read)) for path, read in results.items()]):
        read = results[run.path]
        accuracy = read["accuracy"] if k is None else read["accuracy"][k]
        for stage, value in zip(read["stages"], accuracy, strict=True):
            seed = run.settings.get("seed")
            readings.append(Reading(run.label, str(run.path), seed, depths.index(stage), stage, value))
    save(args, "stages", readings, partial(draw_stages, readings, MEASURES[args.measure].format(k=k)))


def read_out(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What linear_eval.py or knn_eval.py wrote to a run's directory of its newest weights; or `path`, one of their files."""
    kind = "knn_eval" if args.measure == "knn" else "linear_eval"
    files = [path] if path.suffix == ".json" else sorted(path.glob(f"{kind}*.json"))
    found = {file: read_json(file, "read out", "accuracy") for file in files}
    if path.is_dir():
        found = {file: read for file, read in found.items() if not read.get("checkpoint")}
    if args.measure != "knn":
        found = {file: read for file, read in found.items() if read.get("protocol") == args.measure}
    if args.data:
        found = {file: read for file, read in found.items() if read["data"] == args.data}
    if not found:
        on = f" on {args.data}" if args.data else ""
        raise DataError(f"{path} is not read out by that measure{on} yet: run {kind}.py")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise DataError(f"{path} was read out several times ({names}): choose by --data, or give the file for the run")
    return next(iter(found.values()))


def differences(read: dict[str, Any]) -> dict[str, Any]:
    """The settings by which read-outs are told apart: the run's, and those of the reading."""
    reading = {
        "read_at": read.get("image_size"),
        "trained_on": read.get("train"),
        "checkpoint": read.get("checkpoint", ""),
    }
    reading |= {f"read_out_{key}": read.get(key) for key in ("epochs", "lr", "batch_size")}
    return (read["run"] or not_of_a_run(read)) | reading


def longest(stages: dict[Path, list[str]]) -> list[str]:
    """The stages of all, each at its depth: those of the runs read out at most of them. Raises where they do not agree."""
    most = max(stages.values(), key=len)
    for path, names in stages.items():
        if [name for name in most if name in names] != names:
            raise DataError(f"{path} has the stages {', '.join(names)}, others {', '.join(most)}: draw them apart")
    return most


def number_of_neighbours(args: argparse.Namespace, results: dict[Path, dict[str, Any]]) -> str:
    """`--k`, or the smallest that all have been read out by."""
    common = set.intersection(*(set(read["accuracy"]) for read in results.values()))
    k = str(args.k) if args.k else min(common, key=int, default="")
    if k not in common:
        has = "; ".join(f"{path}: {', '.join(read['accuracy'])}" for path, read in results.items())
        raise DataError(
            f"not all runs were read out with {f'k = {k}' if k else 'the same k'} ({has}): run knn_eval.py --k"
        )
    return k


def not_of_a_run(results: dict[str, Any]) -> dict[str, Any]:
    """The settings of an encoder that linear_eval.py was given by `--random` or `--weights`."""
    method = "random start" if "-random-" in results["encoder"] else results["encoder"]
    return {"method": method, **{key: results[key] for key in ("arch", "seed")}}


# ----------------------------------------------------------------------------------------------------------- arguments


def parser() -> Parser:
    result = Parser(description="The paper's figures from your own runs, and the data behind them as CSV.")
    figures = result.add_subparsers(dest="figure", required=True, metavar="FIGURE", parser_class=Parser)

    def figure(draw: Callable[[argparse.Namespace], None], summary: str) -> Parser:
        added = figures.add_parser(draw.__name__, help=summary, description=summary)
        added.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directories of runs")
        added.add_argument("--out", type=Path, default=Path("figures"), metavar="DIR", help="(%(default)s)")
        added.set_defaults(draw=draw)
        return added

    figure(losses, "Figure 2: the loss of every decoder over training")
    add = figure(tsne, "Figure 3: t-SNE of the encoder's vectors of held-out images").add_argument
    add("--classes", type=at_least(1), default=10, metavar="N", help="the first so many (%(default)s)")
    add("--images", type=at_least(1), default=50, metavar="N", help="of each class (%(default)s)")
    add("--data", metavar="NAME", help="(the runs' own)")
    add("--data-dir", type=Path, metavar="DIR", help="where torchvision's data sets are (the runs' own)")
    add("--download", action="store_true", help="download the data set to --data-dir if it is not there")
    add("--image-size", type=at_least(4), metavar="PIXELS", help="resize images (the runs' own)")
    add("--batch-size", type=at_least(1), default=256, metavar="N", help="images at a time (%(default)s)")
    add(
        "--workers",
        type=at_least(0),
        default=0,
        metavar="N",
        help="processes that read images from files (%(default)s)",
    )
    add("--seed", type=at_least(0), default=0, metavar="N", help="of t-SNE (%(default)s)")
    add("--device", type=device, help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    add("--threads", type=at_least(1), metavar="N", help="of the CPU (torch's choice)")
    figure(memory, "Table 7 as bars: the memory that local training saves")
    add = figure(stages, "Accuracy over depth: the read-out of every stage").add_argument
    add(
        "--measure",
        choices=list(MEASURES),
        default="fast",
        help="linear_eval.py's protocols, or knn_eval.py (%(default)s)",
    )
    add("--data", metavar="NAME", help="the data they were read out on, where it is more than one")
    add("--k", type=at_least(1), metavar="K", help="neighbours (the fewest that all runs were read out with)")
    return result


def main(argv: list[str] | None = None) -> int:
    return status_of(parser(), lambda args: args.draw(args), argv)


if __name__ == "__main__":
    sys.exit(main())
