"""Fine-tune trained backbones with few labels: `python examples/few_labels.py runs/simclr runs/gim runs/loco`.

A linear classifier is put onto the top stage's averaged outlet, and both are trained on 1 % and on 10 % of the training
images, as many of each class as there are, by random crops and flips: SimCLR's protocol (Chen et al. 2020, section 6 and
appendix B.5), at a size for small images: Nesterov's momentum, a cosine from --lr, no regularisation. Which images are
labelled depends on --seed alone, so that all backbones see the same ones. `--scratch` adds the same network from random
weights. A run of overlap_curve.py is told its own number of images.

Writes few_labels.json to each run's directory, and prints means over runs of the same name (`.../ROW/seed-K`).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import stoppable

import torch
import torch.nn.functional as F
from backbones import architecture, averaged, told_apart
from command_line import Parser, at_least, device, number_from, status_of
from curves.costs import machine
from curves.results import mean_and_spread
from inputs.image_sets import DataError, Images
from inputs.images import load, tell, with_labels
from inputs.loading import plain_batches, view_batches
from inputs.views import crop_views
from pretraining import runs
from pretraining.optimisers import optimizer, warm_up_and_cosine
from reading.readout import save
from rich.box import SIMPLE_HEAVY
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

SCRATCH = "random start"


class Classifier(nn.Module):
    """A backbone up to its top stage, and linear logits from the average of that stage's outlet: `(N, classes)`."""

    def __init__(self, backbone: nn.Module, top: str, width: int, axis: int, classes: int) -> None:
        super().__init__()
        self.backbone, self.head, self._axis = backbone, nn.Linear(width, classes), axis
        self._outlet: object = None
        backbone.get_submodule(top).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: object, outlet: object) -> None:
        self._outlet = outlet

    def forward(self, images: Tensor) -> Tensor:
        self.backbone(images)
        outlet, self._outlet = self._outlet, None
        return self.head(averaged(outlet, self._axis))


def labelled(labels: Tensor, percent: float, seed: int) -> Tensor:
    """Indices of the images whose labels are known: of each class as many, at least one."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes = labels.unique().tolist()
    each = max(1, round(percent / 100 * len(labels) / len(classes)))
    chosen = [order[labels[order] == label][:each] for label in classes]
    return torch.cat(chosen).sort().values


def fine_tuned(args: argparse.Namespace, backbone: nn.Module, top: str, images: Images, percent: float) -> float:
    """Top-1 on the held-out images, in 0..1."""
    torch.manual_seed(args.seed)
    known = labelled(images.train_labels, percent, args.seed)
    part = Images(images.name, images.train[known], images.train_labels[known], images.test, images.test_labels)
    backbone.to(args.device, memory_format=torch.channels_last)
    first, _ = next(plain_batches(part, "test", 2, args.device))
    (outlet,) = told_apart(backbone, (top,), first)
    model = (
        Classifier(backbone, top, outlet.features.shape[outlet.axis], outlet.axis, images.classes)
        .to(args.device)
        .train()
    )
    batch = min(args.batch_size, len(known))
    each = len(known) // batch
    steps = args.epochs * each
    trained = optimizer("nesterov", model, args.lr, weight_decay=0.0)
    scheduler = warm_up_and_cosine(trained, 0, steps)
    draws = []
    for epoch in range(args.epochs):
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(args.seed * 1_000_003 + epoch))
        draws += [(len(draws) + k, indices) for k, indices in enumerate(order[: each * batch].split(batch))]
    batches = view_batches(part, draws, crop_views(images.size), args.device, views=1)
    for (view,), labels in tqdm(batches, total=steps, unit="step", leave=False, desc=f"{percent:g} %", delay=1):
        F.cross_entropy(model(view), labels).backward()
        trained.step()
        trained.zero_grad()
        scheduler.step()
    return accuracy(model.eval(), part, args.device)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, on: torch.device) -> float:
    batches = plain_batches(images, "test", 512, on)
    right = sum(int((model(pixels).argmax(dim=1) == labels).sum()) for pixels, labels in batches)
    return right / len(images.test_labels)


def run(args: argparse.Namespace) -> None:
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    found: dict[str, dict[float, list[float]]] = {}
    for directory in args.runs:
        settings = runs.read_settings(directory)
        where = args.data or settings["data"], args.data_dir, args.download, settings["image_size"]
        images = tell(load(*where, settings.get("on_broken", "stop")))
        if not isinstance(images, Images):
            raise DataError(f"{images.name} is too large to be held in memory, as this needs it")
        size, held_out = settings.get("images"), settings.get("held_out")
        images = Images(
            images.name,
            images.train[:size],
            images.train_labels[:size],
            images.test[:held_out],
            images.test_labels[:held_out],
        )
        with_labels(images)
        for name in ("", SCRATCH) if args.scratch else ("",):
            reached = {}
            for percent in args.percent:
                trained = runs.load(directory)  # anew for each, since fine-tuning changes it
                backbone = trained.backbone
                if name:
                    torch.manual_seed(settings.get("seed", 0))
                    backbone = architecture(settings["arch"], settings.get("stages")).make(settings["image_size"])
                reached[f"{percent:g}"] = fine_tuned(args, backbone, trained.stages[-1], images, percent)
                row = name or str(settings.get("method", directory.name))
                found.setdefault(row, {}).setdefault(percent, []).append(100 * reached[f"{percent:g}"])
            about = {"accuracy": reached, "start": name or "trained", "run": settings, "on": machine(args.device)}
            about |= {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
            save(directory / f"few_labels{'-scratch' if name else ''}.json", about)
    show(found)


def show(found: dict[str, dict[float, list[float]]]) -> None:
    """A line for each name, with mean and standard deviation over its runs."""
    table = Table(title="Fine-tuned, top-1 on held-out images, %", title_justify="left", box=SIMPLE_HEAVY)
    table.add_column("pretrained by", no_wrap=True)
    for percent in next(iter(found.values())):
        table.add_column(f"{percent:g} % of labels", justify="right")
    for row, by_percent in found.items():
        table.add_row(row, *map(mean_and_spread, by_percent.values()))
    Console().print(table)


def parser() -> Parser:
    result = Parser(
        description="Fine-tune trained backbones with few labels.",
        epilog="example: python examples/few_labels.py runs/digits-presnet_small-loco --percent 10",
    )
    add = result.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="directories of pretrain.py's or overlap_curve.py's runs")
    add(
        "--percent",
        type=number_from(0, above=True, most=100),
        nargs="+",
        default=[1.0, 10.0],
        metavar="P",
        help="labelled (1 10)",
    )
    add("--scratch", action="store_true", help="the same network from random weights, too")
    add("--data", metavar="NAME", help="(each run's own)")
    add(
        "--data-dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="where torchvision's data sets are (%(default)s)",
    )
    add("--download", action="store_true", help="download the data set to --data-dir if it is not there")
    add("--epochs", type=at_least(1), default=60, metavar="N", help="(%(default)s)")
    add("--batch-size", type=at_least(2), default=128, metavar="N", help="(%(default)s)")
    add("--lr", type=number_from(0, above=True), default=0.05, metavar="LR", help="(%(default)g)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="(%(default)s)")
    add("--device", type=device, help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    add("--threads", type=at_least(1), metavar="N", help="of the CPU (torch's choice)")
    return result


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    again = shlex.join(["python", "examples/few_labels.py", *argv])
    return status_of(parser(), run, argv, f"stopped; start again with: {again}")


if __name__ == "__main__":
    sys.exit(main())
