"""Read out each stage by semantic segmentation: `python examples/detection/segment.py runs/loco --data data/coco`.

What does local learning keep, stage by stage? On every stage of the frozen backbone a 1x1 convolution, behind a BatchNorm
without weights of its own, tells the class of each position, "background" among them; its map is resized to the image's size.
All stages are read out in one pass. The figure is the mean over classes of intersection over union (mIoU), on square images
of `--size` pixels. Not in the paper. With `--merge group` the classes are COCO's supercategories, with `--merge all` there is
one: object or not. Pixels of crowds count neither way.

Writes segment.json to the run's directory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import stoppable

import torch
import torch.nn.functional as F
from batches import trainable
from command_line import Parser, at_least, device, number_from, status_of
from curves.costs import machine
from inputs.images import DataError
from inputs.loading import normalised
from instances import InstanceSet, Photo, masks_of
from options import start
from pretraining.draws import Draws
from pretraining.runs import commit
from pyramid import check_maps, outlets_of
from reading.encoders import Encoder, add_start_arguments
from reports import save_json
from rich.box import SIMPLE_HEAVY
from rich.console import Console
from rich.table import Table
from sets import add_data_arguments, load_part
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V
from tqdm import tqdm

IGNORED = 255  # in a map of classes: a crowd's pixels


def class_map(photo: Photo) -> Tensor:
    """`(H, W)`, uint8: 0 is the background, and of overlapping instances the smaller one is in front."""
    painted = torch.zeros(photo.height, photo.width, dtype=torch.uint8)
    for instance in sorted(photo.instances, key=lambda instance: (not instance.crowd, -instance.area)):
        painted[masks_of([instance], photo)[0].bool()] = IGNORED if instance.crowd else instance.label
    return painted


def batches(
    args: argparse.Namespace,
    encoder: Encoder,
    photos: Sequence[Photo],
    order: Iterator[Tensor],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Square images as the backbone takes them `(N, 3, S, S)`, and their maps of classes `(N, S, S)`."""
    for indices in order:
        chosen = [photos[index] for index in indices.tolist()]
        pairs = [square_pair(photo, args.size) for photo in chosen]
        images, maps = (torch.stack(each).to(args.device) for each in zip(*pairs, strict=True))
        yield normalised(images.float() / 255, encoder.mean, encoder.std), maps.long()


def square_pair(photo: Photo, size: int) -> tuple[Tensor, Tensor]:
    """An image `(3, S, S)` and its map of classes `(S, S)`, uint8; a file that cannot be read is grey, and does not count."""
    try:
        image = V.resize(photo.read(), [size, size], antialias=True)
    except DataError as problem:
        print(f"warning: {problem}; it does not count", file=sys.stderr)
        return torch.full((3, size, size), 128, dtype=torch.uint8), torch.full((size, size), IGNORED, dtype=torch.uint8)
    return image, V.resize(class_map(photo)[None], [size, size], InterpolationMode.NEAREST)[0]


class Heads(nn.ModuleList):
    """A 1x1 convolution for each stage."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__(
            nn.Sequential(nn.BatchNorm2d(width, affine=False), nn.Conv2d(width, classes, 1)) for width in widths
        )

    def forward(self, outlets: Sequence[Tensor], size: int) -> list[Tensor]:
        maps = [head(outlet) for head, outlet in zip(self, outlets, strict=True)]
        return [F.interpolate(each, size=(size, size), mode="bilinear", align_corners=False) for each in maps]


def intersection_over_union(confusion: Tensor) -> float:
    """The mean over the classes that are there; `confusion[i, j]`: pixels of class i that are taken for class j."""
    both = confusion.diagonal().double()
    either = confusion.sum(dim=0) + confusion.sum(dim=1) - both
    there = confusion.sum(dim=1) > 0
    return float((both[there] / either[there]).mean())


def read_out(
    args: argparse.Namespace, encoder: Encoder, found: InstanceSet, held_out: InstanceSet
) -> tuple[list[float], list[str]]:
    """The mIoU of each stage on the held-out images, and the names of the classes."""
    classes = ["background", *found.classes]
    if len(classes) > IGNORED:
        raise DataError(f"there are {len(classes)} classes, more than {IGNORED}: use --merge group")
    photos, backbone, stages = trainable(found.photos), encoder.backbone, list(encoder.stages)
    check_maps(backbone, encoder.stages, args.size)
    size = min(args.batch_size, len(photos))
    draws = Draws(len(photos), size, args.epochs * (len(photos) // size), args.seed)
    torch.manual_seed(args.seed)
    with torch.no_grad():
        widths = [
            outlet.shape[1]
            for outlet in outlets_of(backbone, stages, torch.zeros(1, 3, args.size, args.size).to(args.device))
        ]
    heads = Heads(widths, len(classes)).to(args.device)
    optimizer = torch.optim.Adam(heads.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(draws))
    order = (indices for _, indices in draws)
    progress = tqdm(batches(args, encoder, photos, order), total=len(draws), unit="step", dynamic_ncols=True)
    for images, maps in progress:
        with torch.no_grad():
            outlets = outlets_of(backbone, stages, images)
        counted = (maps != IGNORED).sum().clamp(min=1)
        sums = [F.cross_entropy(s, maps, ignore_index=IGNORED, reduction="sum") for s in heads(outlets, args.size)]
        losses = torch.stack(sums) / counted
        losses.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        progress.set_postfix_str(" ".join(f"{loss:.2f}" for loss in losses.tolist()), refresh=False)
    return measured(args, encoder, held_out, heads.eval(), len(classes)), classes


@torch.no_grad()
def measured(args: argparse.Namespace, encoder: Encoder, found: InstanceSet, heads: Heads, classes: int) -> list[float]:
    confusions = torch.zeros(len(heads), classes, classes, dtype=torch.int64)
    order = iter(torch.arange(len(found.photos)).split(args.batch_size))
    for images, maps in batches(args, encoder, found.photos, order):
        counted = maps != IGNORED
        outlets = outlets_of(encoder.backbone, list(encoder.stages), images)
        for confusion, scores in zip(confusions, heads(outlets, args.size), strict=True):
            pairs = maps[counted] * classes + scores.argmax(dim=1)[counted]
            confusion.add_(torch.bincount(pairs, minlength=classes**2).reshape(classes, classes).cpu())
    return [intersection_over_union(confusion) for confusion in confusions]


def run(args: argparse.Namespace) -> None:
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    encoder = start(args)
    encoder.backbone.to(args.device).eval().requires_grad_(False)
    found, held_out = load_part(args, "train"), load_part(args, "val")
    if found.classes != held_out.classes:
        raise DataError(f"{found.name} and {held_out.name} must have the same categories")
    values, classes = read_out(args, encoder, found, held_out)
    table = Table("stage", box=SIMPLE_HEAVY)
    table.add_column("mIoU, %", justify="right")
    for stage, value in zip(encoder.stages, values, strict=True):
        table.add_row(stage, f"{100 * value:.2f}")
    console = Console()
    console.print(
        f"{encoder.name}: {len(classes)} classes, {len(held_out.photos)} images of {held_out.name}", style="bold"
    )
    console.print(table)
    results = {"stages": list(encoder.stages), "miou": values, "classes": classes, "encoder": encoder.name}
    chosen = {name: getattr(args, name) for name in ("merge", "size", "epochs", "batch_size", "lr", "seed")}
    directory = args.out or encoder.directory
    directory.mkdir(parents=True, exist_ok=True)
    about = {"data": held_out.name, "images": len(held_out.photos), "trained_on": len(found.photos)}
    about |= {"commit": commit(), "torch": torch.__version__, "machine": machine(args.device)}
    save_json(directory / "segment.json", results | chosen | about)
    print(f"wrote {directory / 'segment.json'}")


def parser() -> Parser:
    result = Parser(
        description="Read out each stage of a frozen backbone by semantic segmentation.",
        epilog="example: python examples/detection/segment.py runs/loco --data data/coco --merge group",
    )
    add = result.add_argument
    add_start_arguments(result)
    add("--image-size", type=at_least(4), metavar="PIXELS", help="that --random is built for (224)")
    add_data_arguments(result)
    add("--size", type=at_least(16), default=224, metavar="PIXELS", help="a side of the images (%(default)s)")
    add("--epochs", type=at_least(1), default=20, metavar="N", help="(%(default)s)")
    add("--batch-size", type=at_least(2), default=16, metavar="N", help="(%(default)s)")
    add("--lr", type=number_from(0, above=True), default=1e-2, metavar="LR", help="of Adam, cosine decay (%(default)g)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="(%(default)s)")
    add("--device", type=device, help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    add("--threads", type=at_least(1), metavar="N", help="of the CPU (torch's choice)")
    add("--out", type=Path, metavar="DIR", help="where the results go (the run's directory)")
    return result


def main(argv: list[str] | None = None) -> int:
    return status_of(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
