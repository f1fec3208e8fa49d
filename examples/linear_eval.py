"""Read out a frozen encoder by linear classifiers, one per stage: `python examples/linear_eval.py runs/loco`.

Table 1's last column: ImageNet, 800 epochs of pretraining, `--protocol paper` at the top stage: SimCLR 69.8, GIM 64.7,
LoCo 69.5 (ResNet-50); 69.1, 63.5, 69.3 (ShuffleNet v2-50).

`--protocol fast` (default) computes each image's features once and fits a logistic regression to them. `--protocol paper`
is the paper's: SGD without momentum, learning rate 30, divided by 10 after 30, 60, 90 of 100 epochs, on random crops and
flips (MoCo's settings for the rest: batch 256, no weight decay). It resumes after the last epoch that was finished. Both
read out every stage, in one pass over the images: where along the depth does a local method lose what another keeps?

Writes linear_eval-PROTOCOL-DATA.json to the run's directory, with -CHECKPOINT before .json where RUN is one; older results of
that name stay as .json.1 and so on.
"""

from __future__ import annotations

import argparse
import pickle
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import stoppable

import torch
import torch.nn.functional as F
from backbones import StageFeatures
from command_line import Parser, at_least, number_from, status_of, write
from inputs.image_sets import DataError, Folder, Images
from inputs.loading import plain_batches, view_batches
from inputs.views import crop_views
from reading.encoders import Encoder, about, add_arguments, chosen, vectors
from reading.evaluate import logistic_regression
from reading.readout import file_name, save, show
from torch import Tensor, nn
from tqdm import tqdm

MILESTONES = (0.3, 0.6, 0.9)  # of the epochs: where the learning rate is divided by 10


def fast(args: argparse.Namespace, encoder: Encoder, images: Images | Folder) -> list[float]:
    """Test accuracy of a logistic regression on each stage's features."""
    train, train_labels = vectors(args, encoder, images, "train")
    test, test_labels = vectors(args, encoder, images, "test")
    labels = train_labels.to(args.device), test_labels.to(args.device)
    pairs = tqdm(zip(train, test, strict=True), total=len(train), desc="probes", unit="stage", leave=False)
    return [logistic_regression(x.to(args.device), labels[0], y.to(args.device), labels[1]) for x, y in pairs]


class Heads(nn.ModuleList):
    """A linear classifier per stage, each on its own."""

    def __init__(self, widths: list[int], classes: int) -> None:
        super().__init__(nn.Linear(width, classes) for width in widths)
        for head in self:
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, outlets: list[Tensor]) -> list[Tensor]:
        return [head(outlet) for head, outlet in zip(self, outlets, strict=True)]


def paper(args: argparse.Namespace, encoder: Encoder, images: Images | Folder) -> list[float]:
    """Test accuracy of a linear classifier on each stage, trained on random crops by the paper's schedule."""
    torch.manual_seed(args.seed)
    first, _ = next(plain_batches(images, "test", 1, args.device))
    features = StageFeatures(encoder.backbone, encoder.stages)
    heads = Heads([outlet.shape[1] for outlet in features(first)], images.classes).to(args.device)
    optimizer = torch.optim.SGD(heads.parameters(), lr=args.lr * args.batch_size / 256)
    milestones = [round(part * args.epochs) for part in MILESTONES]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    path = results_path(args, encoder, images).with_suffix(".pt")
    checkpoint = Checkpoint(path, settings(args, encoder, images))
    done = checkpoint.restore(heads, optimizer, scheduler) if args.resume else 0
    steps = -(-len(images.train_labels) // args.batch_size)
    with tqdm(total=args.epochs * steps, initial=done * steps, unit="step", dynamic_ncols=True) as progress:
        for epoch in range(done, args.epochs):
            losses = []
            for (view,), labels in epoch_views(args, encoder, images, epoch):
                outputs = heads(features(view))
                loss = torch.stack([F.cross_entropy(output, labels) for output in outputs])
                loss.sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
                progress.update()
            scheduler.step()
            progress.set_postfix_str(" ".join(f"{loss:.2f}" for loss in torch.stack(losses).mean(dim=0).tolist()))
            checkpoint.save(epoch + 1, heads, optimizer, scheduler)
    return accuracies(args, encoder, images, features, heads)


def epoch_views(args: argparse.Namespace, encoder: Encoder, images: Images | Folder, epoch: int) -> Any:
    """Random crops of all training images, in a random order; an epoch's draws need nothing from those before."""
    seed = (args.seed * 1_000_003 + epoch) * 1_000_003
    order = torch.randperm(len(images.train_labels), generator=torch.Generator().manual_seed(seed))
    steps = [(seed + 1 + step, batch) for step, batch in enumerate(order.split(args.batch_size))]
    view = replace(crop_views(images.size), mean=encoder.mean, std=encoder.std)
    return view_batches(images, steps, view, args.device, views=1, workers=args.workers)


@torch.no_grad()
def accuracies(
    args: argparse.Namespace, encoder: Encoder, images: Images | Folder, features: StageFeatures, heads: Heads
) -> list[float]:
    right = torch.zeros(len(heads), device=args.device)
    batches = plain_batches(images, "test", args.batch_size, args.device, encoder.mean, encoder.std, args.workers)
    for pixels, labels in batches:
        outputs = heads(features(pixels))
        right += torch.stack([(output.argmax(dim=1) == labels).sum() for output in outputs])
    return (right / len(images.test_labels)).tolist()


class Checkpoint:
    """The paper's protocol after a number of epochs: one file, of one encoder and one setting."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings

    def save(self, epoch: int, *parts: Any) -> None:
        contents = {"settings": self.settings, "epoch": epoch, "parts": [part.state_dict() for part in parts]}
        write(self.path, lambda path: torch.save(contents, path))

    def restore(self, *parts: Any) -> int:
        """Take up what was saved; returns how many epochs are done, 0 where nothing was saved."""
        if not self.path.is_file():
            return 0
        try:
            contents = torch.load(self.path, map_location="cpu", weights_only=True)
            if contents["settings"] != self.settings:
                raise DataError(f"{self.path} is of a read-out with other settings: delete it, or leave out --resume")
            for part, state in zip(parts, contents["parts"], strict=True):
                part.load_state_dict(state)
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as problem:
            raise DataError(f"{self.path} is no checkpoint of linear_eval.py: delete it") from problem
        return int(contents["epoch"])


def settings(args: argparse.Namespace, encoder: Encoder, images: Images | Folder) -> dict[str, Any]:
    """What the read-out depends on, the encoder's weights among it."""
    weights = sum(float(value.double().abs().sum()) for value in encoder.backbone.state_dict().values())
    chosen = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "weights": weights}
    return about(args, encoder, images) | chosen


def results_path(args: argparse.Namespace, encoder: Encoder, images: Images | Folder) -> Path:
    return encoder.directory / file_name("linear_eval", args.protocol, images.name, encoder.checkpoint)


def parser() -> Parser:
    result = Parser(
        description="Read out a frozen encoder by linear classifiers, one per stage.",
        epilog="example: python examples/linear_eval.py --arch resnet50 --weights DEFAULT --data imagenette --download",
    )
    add_arguments(result)
    add = result.add_argument
    add(
        "--protocol",
        choices=["fast", "paper"],
        default="fast",
        help="logistic regression, or the paper's (%(default)s)",
    )
    add(
        "--per-stage", action=argparse.BooleanOptionalAction, default=True, help="all stages, or the top one only (all)"
    )
    add("--epochs", type=at_least(1), default=100, metavar="N", help="of the paper's protocol (%(default)s)")
    add(
        "--lr",
        type=number_from(0, above=True),
        default=30.0,
        metavar="LR",
        help="of the paper's protocol, at batch 256 (%(default)g)",
    )
    add(
        "--resume",
        action="store_true",
        help="the paper's protocol: go on after the last finished epoch, if there is one",
    )
    return result


def run(args: argparse.Namespace) -> None:
    encoder, images = chosen(args)
    if not args.per_stage:
        encoder = replace(encoder, stages=encoder.stages[-1:])
    accuracy = (fast if args.protocol == "fast" else paper)(args, encoder, images)
    results = {"protocol": args.protocol, "stages": list(encoder.stages), "accuracy": accuracy}
    results |= about(args, encoder, images)
    if args.protocol == "paper":
        results |= {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr}
    show(
        f"{encoder.name} on {images.name}: linear read-out, {args.protocol}",
        encoder.stages,
        {"top-1, %": accuracy},
        images,
    )
    save(results_path(args, encoder, images), results)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv

    def stopped(args: argparse.Namespace) -> str:
        again = shlex.join(["python", "examples/linear_eval.py", *argv])
        if args.protocol == "fast":
            return f"stopped; start again with: {again}"
        return f"stopped; go on after the last finished epoch with: {again}{'' if args.resume else ' --resume'}"

    return status_of(parser(), run, argv, stopped)


if __name__ == "__main__":
    sys.exit(main())
