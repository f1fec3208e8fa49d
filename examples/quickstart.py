"""Train one backbone by SimCLR, Greedy InfoMax and LoCo on real images, side by side: `python examples/quickstart.py`.

By default on scikit-learn's 1,797 handwritten digits of 8x8 pixels, which come with it: nothing is downloaded. All methods
get the same initial weights, the same decoder, the same views in the same order and the same number of steps; they differ
in how far each loss reaches. Two rows to compare with: the backbone at its random start, and the same one trained end to
end with the labels. The digits held out are by people who wrote none of those trained on.

Prints a table; writes results.json, quickstart.png and, after each epoch, checkpoint.pt. The settings were chosen for
a run of one or two minutes on two cores, and not for the best accuracy of any method.
"""

from __future__ import annotations

import argparse
import json
import pickle
import platform
import shlex
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from command_line import Parser, at_least, device, write
from drawing.picture import draw
from inputs.images import NAMES, DataError, Images, load
from inputs.views import Views, colour_views, grey_views
from reading.evaluate import features, knn, linear_probe
from rich.box import SIMPLE_HEAVY
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

import locallearn
from locallearn import ConvMLPDecoder, LocalWrapper
from locallearn.memory import measure

# The stages hold about equally much, as those of the paper's PResNet-50 do: a local method's memory is that of its largest.
WIDTHS = (16, 16, 48, 48, 64, 64)
STRIDES = (1, 1, 2, 1, 1, 1)
STAGES = [f"layer{i + 1}" for i in range(len(WIDTHS))]
LEARNING_RATE = 2e-3


class Block(nn.Module):
    """ResNet's basic block: two 3x3 convolutions and a shortcut."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width_out),
            nn.ReLU(),
            nn.Conv2d(width_out, width_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(width_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or width_in != width_out:
            projection = nn.Conv2d(width_in, width_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(width_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A stem that brings images to about 16x16 and one block per stage: `(N, C, S, S)` -> features `(N, 64)`."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        stride = max(1, round(size / 16))
        patches = nn.Conv2d(channels, WIDTHS[0], stride + 2, stride, padding=1, bias=False)
        self.stem = nn.Sequential(patches, nn.BatchNorm2d(WIDTHS[0]), nn.ReLU())
        widths_in = (WIDTHS[0], *WIDTHS)
        for name, width_in, width_out, stride in zip(STAGES, widths_in, WIDTHS, STRIDES, strict=False):
            self.add_module(name, Block(width_in, width_out, stride))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for name in STAGES:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))


class Classifier(nn.Module):
    """The supervised row's decoder: average pooling and one linear layer."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean(dim=(2, 3)))


def cross_entropy(first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
    """The supervised row's loss: the mean over both views."""
    return (F.cross_entropy(first, labels) + F.cross_entropy(second, labels)) / 2


@dataclass
class Method:
    """A way to train the backbone, and what was seen while doing so."""

    name: str
    model: LocalWrapper
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    supervised: bool
    losses: list[list[float]] = field(default_factory=list)  # (steps, units)
    seconds: list[float] = field(default_factory=list)  # (steps,)

    def local_step(self, views: list[Tensor], labels: Tensor) -> Tensor:
        return self.model.local_step(*views, targets=labels if self.supervised else None)

    def train_step(self, views: list[Tensor], labels: Tensor) -> None:
        start = _now(labels.device)
        losses = self.local_step(views, labels)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.seconds.append(_now(labels.device) - start)
        self.losses.append(losses.tolist())

    def state(self) -> dict[str, Any]:
        parts = {part: getattr(self, part).state_dict() for part in ("model", "optimizer", "scheduler")}
        return {**parts, "losses": self.losses, "seconds": self.seconds}

    def restore(self, state: dict[str, Any]) -> None:
        for part in ("model", "optimizer", "scheduler"):
            getattr(self, part).load_state_dict(state[part])
        self.losses, self.seconds = state["losses"], state["seconds"]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def new_backbone(args: argparse.Namespace, images: Images) -> SmallResNet:
    """The start that all methods share."""
    torch.manual_seed(args.seed)
    backbone = SmallResNet(images.channels, images.size)
    return backbone.to(args.device, memory_format=torch.channels_last)  # a third faster on a CPU


def new_decoder(width: int, seed: int) -> nn.Module:
    """The same for a width in all methods, however many decoders were made before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConvMLPDecoder(width)


def new_methods(args: argparse.Namespace, images: Images, steps: int) -> list[Method]:
    """SimCLR, GIM, LoCo and supervised training, each with a backbone of its own: one wrapper, three overlaps."""
    end_to_end = len(STAGES) - 1

    def method(name: str, overlap: int, supervised: bool = False) -> Method:
        model = LocalWrapper(
            new_backbone(args, images),
            stages=STAGES,
            overlap=overlap,
            decoder=partial(Classifier, classes=images.classes) if supervised else partial(new_decoder, seed=args.seed),
            loss=cross_entropy if supervised else None,
            example=torch.zeros(2, images.channels, images.size, images.size, device=args.device),
        )
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4)
        warm_up_and_cosine = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
        )
        return Method(name, model, optimizer, warm_up_and_cosine, supervised)

    return [
        method("SimCLR", overlap=end_to_end),
        method("Greedy InfoMax", overlap=0),
        method("LoCo", overlap=args.overlap),
        method("supervised", overlap=end_to_end, supervised=True),
    ]


def views_of(images: Images) -> Views:
    """Random views that suit the data set."""
    if images.channels == 3:
        return colour_views(images.size)
    return partial(grey_views, flip=images.name == "fashion-mnist")


def train(args: argparse.Namespace, images: Images, methods: list[Method], first_epoch: int) -> None:
    """All methods step by step in turn: they see the same views, and the machine's moods."""
    view, labels = views_of(images), images.train_labels.to(args.device)
    steps = len(labels) // args.batch_size
    with tqdm(total=args.epochs * steps, initial=first_epoch * steps, unit="step", dynamic_ncols=True) as progress:
        for epoch in range(first_epoch, args.epochs):
            torch.manual_seed(args.seed * 1_000_003 + epoch)  # an epoch's draws need nothing from those before
            order = torch.randperm(len(labels))[: steps * args.batch_size]
            for batch in order.split(args.batch_size):
                views = [view(images.train[batch]).to(args.device) for _ in range(2)]
                for method in methods:
                    method.train_step(views, labels[batch.to(args.device)])
                progress.set_postfix_str("  ".join(f"{m.name} {m.losses[-1][-1]:.2f}" for m in methods), refresh=False)
                progress.update()
            save(args, epoch + 1, methods)


@dataclass(frozen=True)
class Row:
    """A line of the table; None where a backbone was not trained."""

    method: str
    units: int | None
    probe_accuracy: float
    knn_accuracy: float
    peak_activation_bytes: int | None = None
    ms_per_step: float | None = None
    step_flops: int | None = None
    step_flops_relative: float | None = None


def table_rows(args: argparse.Namespace, images: Images, methods: list[Method]) -> list[Row]:
    """Accuracy on the held-out images and cost of a training step, for each method."""

    def accuracies(backbone: nn.Module) -> tuple[float, float]:
        known, held_out = features(backbone, images.train), features(backbone, images.test)
        data = known, images.train_labels, held_out, images.test_labels
        return linear_probe(*data), knn(*data)

    view = views_of(images)
    views = [view(images.train[: args.batch_size]).to(args.device) for _ in range(2)]
    labels = images.train_labels[: args.batch_size].to(args.device)

    rows = [Row("random start", None, *accuracies(new_backbone(args, images)))]
    end_to_end_flops = 0
    for method in methods:
        probe, neighbours = accuracies(method.model.backbone)
        method.local_step(views, labels)  # so that the gradients' own memory is not counted
        cost = measure(partial(method.local_step, views, labels))
        end_to_end_flops = end_to_end_flops or cost.flops
        units = len(method.model.plan.units)
        ms = 1e3 * statistics.median(method.seconds)
        relative = cost.flops / end_to_end_flops
        rows.append(Row(method.name, units, probe, neighbours, cost.peak_bytes, ms, cost.flops, relative))
    return rows


def show(rows: list[Row], images: Images, args: argparse.Namespace) -> None:
    """Print the table and how to read it."""
    title = f"{images.name}, {args.epochs} epochs of batch {args.batch_size}, LoCo's overlap {args.overlap}"
    table = Table(title=title, box=SIMPLE_HEAVY, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for heading in (
        "units",
        "linear\nprobe, %",
        "kNN, %",
        "activa-\ntions, MB",
        "ms per\nstep",
        "FLOPs,\nrelative",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        accuracies = [accuracy_text(p, len(images.test)) for p in (row.probe_accuracy, row.knn_accuracy)]
        units, *costs = [""] * 4
        if row.units is not None:
            units = str(row.units)
            costs = [
                f"{row.peak_activation_bytes / 1e6:.1f}",
                f"{row.ms_per_step:.0f}",
                f"{row.step_flops_relative:.2f}",
            ]
        table.add_row(row.method, units, *accuracies, *costs)
    console = Console()
    console.print(table)
    console.print(
        f"Accuracies are on {len(images.test)} held-out images, ± their standard error. Activations: the peak of all that a "
        "training step makes beside gradients; they and FLOPs (SimCLR = 1) are counted exactly. Times are medians over "
        "interleaved steps; machines are noisy.",
        style="dim",
        highlight=False,
    )


def accuracy_text(p: float, n: int) -> str:
    return f"{100 * p:.1f} ± {100 * (p * (1 - p) / n) ** 0.5:.1f}"


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What a run's results depend on."""
    return {name: getattr(args, name) for name in ("data", "image_size", "epochs", "batch_size", "overlap", "seed")}


def save(args: argparse.Namespace, epoch: int, methods: list[Method]) -> None:
    states = {method.name: method.state() for method in methods}
    checkpoint = {"settings": settings(args), "epoch": epoch, "methods": states}
    write(args.out / "checkpoint.pt", lambda path: torch.save(checkpoint, path))


def restore(args: argparse.Namespace, methods: list[Method]) -> int:
    """Take up the run in `args.out`; returns how many epochs it has behind it."""
    path = args.out / "checkpoint.pt"
    if not path.is_file():
        raise DataError(f"there is nothing to resume: {path} does not exist")
    try:
        checkpoint = torch.load(path, map_location=args.device, weights_only=True)
        before = checkpoint["settings"]
        if changed := [name for name, value in settings(args).items() if before[name] != value]:
            options = " ".join(
                f"--{name.replace('_', '-')} {before[name]}" for name in changed if before[name] is not None
            )
            raise DataError(f"{path} is of a run with other settings: resume it with {options or 'its own options'}")
        for method in methods:
            method.restore(checkpoint["methods"][method.name])
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as problem:
        raise DataError(f"{path} is not a checkpoint of this example") from problem
    return int(checkpoint["epoch"])


def results(args: argparse.Namespace, images: Images, methods: list[Method], rows: list[Row]) -> dict[str, Any]:
    """What results.json says: settings, versions, the table, and the mean loss of each unit in each epoch."""
    steps = len(images.train) // args.batch_size
    return {
        "settings": settings(args),
        "versions": {"locallearn": locallearn.__version__, "torch": torch.__version__},
        "machine": f"{args.device.type}, {torch.get_num_threads()} threads, {platform.machine()}",
        "images": {"name": images.name, "train": len(images.train), "test": len(images.test), "size": images.size},
        "table": [asdict(row) for row in rows],
        "units": {m.name: [[unit.first, unit.last] for unit in m.model.plan.units] for m in methods},
        "losses": {m.name: torch.tensor(m.losses).unflatten(0, (-1, steps)).mean(dim=1).tolist() for m in methods},
    }


def parser() -> Parser:
    result = Parser(
        description="Train one backbone by SimCLR, Greedy InfoMax and LoCo side by side, on real images.",
        epilog="example: python examples/quickstart.py --data cifar10 --download --epochs 20 --batch-size 256",
    )
    add = result.add_argument
    add("--data", default="digits", metavar="NAME", help=f"{NAMES} (default: %(default)s)")
    add(
        "--data-dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="where torchvision's data sets are (%(default)s)",
    )
    add("--download", action="store_true", help="download the data set to --data-dir if it is not there")
    add("--image-size", type=at_least(4), metavar="PIXELS", help="resize images (as they are; image folders: 64)")
    add("--epochs", type=at_least(1), default=25, metavar="N", help="passes over the images (%(default)s)")
    add(
        "--batch-size",
        type=at_least(2),
        default=128,
        metavar="N",
        help="images a step, two views of each (%(default)s)",
    )
    add(
        "--overlap",
        type=int,
        default=1,
        metavar="N",
        help=f"stages that LoCo's units share, of {len(STAGES)} (%(default)s)",
    )
    add("--seed", type=at_least(0), default=0, metavar="N", help="of weights, views and order (%(default)s)")
    add("--device", type=device, default=None, help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    add(
        "--threads",
        type=at_least(1),
        metavar="N",
        help="of the CPU (1 for images up to 16 pixels, else torch's choice)",
    )
    add("--out", type=Path, default=Path("runs/quickstart"), metavar="DIR", help="where the results go (%(default)s)")
    add("--resume", action="store_true", help="go on after the last epoch saved in --out")
    return result


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    if not 0 <= args.overlap < len(STAGES):
        raise DataError(f"--overlap is between 0 and {len(STAGES) - 1} for {len(STAGES)} stages, got {args.overlap}")
    images = load(args.data, args.data_dir, args.download, args.image_size)
    if not isinstance(images, Images):
        raise DataError(f"{images.name} is too large for the quickstart's memory: take a smaller one, or --image-size")
    steps = len(images.train) // args.batch_size
    if not steps:
        raise DataError(
            f"--batch-size {args.batch_size} is larger than the {len(images.train)} images of {images.name}"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    if args.threads or images.size <= 16:
        torch.set_num_threads(
            args.threads or 1
        )  # on small images they mostly wait for each other, on a busy machine long

    methods = new_methods(args, images, args.epochs * steps)
    first_epoch = restore(args, methods) if args.resume else 0
    if not first_epoch:
        (args.out / "checkpoint.pt").unlink(missing_ok=True)
    print(f"{len(images.train)} images; LoCo's plan, a line per loss:\n{methods[2].model.plan}\nThe top units' losses:")
    train(args, images, methods, first_epoch)
    rows = table_rows(args, images, methods)
    summary = results(args, images, methods, rows)
    show(rows, images, args)
    view = views_of(images)
    samples = [images.train[:6], view(images.train[:6]), view(images.train[:6])]
    write(args.out / "results.json", lambda path: path.write_text(json.dumps(summary, indent=1) + "\n"))
    write(args.out / "quickstart.png", lambda path: draw(summary, samples, path))
    print(f"{time.perf_counter() - start:.0f} s; wrote {args.out}/quickstart.png and results.json")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser()
    args = arguments.parse_args(argv)
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        run(args)
    except DataError as problem:
        arguments.error(str(problem))
    except OSError as problem:
        arguments.error(f"cannot write to {args.out}: {problem.strerror or problem}")
    except KeyboardInterrupt:
        again = shlex.join(["python", "examples/quickstart.py", *argv, *([] if args.resume else ["--resume"])])
        saved = (args.out / "checkpoint.pt").is_file()
        what = f"finished epochs are saved, go on with: {again}" if saved else "no epoch was finished, nothing is saved"
        print(f"\nstopped; {what}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
