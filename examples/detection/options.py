"""The command line of train.py: its options, the paper's schedules, and what follows from them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from batches import trainable
from command_line import Parser, at_least, number_from
from detector import Size
from inputs.images import DataError
from instances import InstanceSet
from pretraining.progress import summary_writer
from pretraining.run_options import add_run_arguments
from pretraining.training import AMP
from reading.encoders import Encoder, add_start_arguments, encoder_of
from sets import add_data_arguments

BATCH = 16  # images a step: what the paper's iterations and learning rate are for


@dataclass(frozen=True)
class Schedule:
    """How long to train, and on images of which size.

    Attributes:
        epochs: passes over the images, or
        iterations: steps of 16 images.
        drops: parts of the whole after which the learning rate is divided by 10.
        shorter: pixels of an image's shorter side.
        longest: pixels that the longer side may have.
    """

    epochs: int | None
    iterations: int | None
    drops: tuple[float, float]
    shorter: tuple[int, ...]
    longest: int


MULTI_SCALE = tuple(range(640, 801, 32))
# mmdetection's schedules, which the paper followed. It adapted those of few labels and does not say how: their drops here
# are at the same parts as those of detectron2's 1x.
SCHEDULES = {
    "1x": Schedule(12, None, (8 / 12, 11 / 12), (800,), 1333),
    "cityscapes": Schedule(64, None, (56 / 64, 56 / 64), tuple(range(800, 1025, 32)), 2048),
    "coco-10k": Schedule(None, 60_000, (2 / 3, 8 / 9), MULTI_SCALE, 1333),
    "coco-1k": Schedule(None, 15_000, (2 / 3, 8 / 9), MULTI_SCALE, 1333),
}

RESULTS_DEPEND_ON = (
    *("merge", "mode", "schedule", "steps", "batch_size", "lr", "weight_decay", "warm_up", "drops"),
    *("shorter", "longest", "width", "hidden", "rois", "amp", "seed", "log_every"),
)


def parser() -> Parser:
    result = Parser(
        description="Train Mask R-CNN on a backbone and measure its average precision.",
        epilog="example: python examples/detection/train.py runs/loco --data data/coco --mode frozen --schedule 1x",
    )
    add = result.add_argument
    add_start_arguments(result)
    add(
        "--image-size",
        type=at_least(4),
        metavar="PIXELS",
        help="that --random is built for: up to 64, a stem without stride",
    )
    add_data_arguments(result)
    add(
        "--mode",
        choices=["frozen", "finetune", "scratch"],
        default="frozen",
        help="all of the backbone stays as it is, or conv1 and res2 do, or nothing does (%(default)s)",
    )
    add(
        "--schedule",
        choices=list(SCHEDULES),
        default="1x",
        help="the paper's; the options below change it (%(default)s)",
    )
    length = result.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=at_least(1), metavar="N", help="passes over the images")
    length.add_argument("--iterations", type=at_least(1), metavar="N", help=f"steps of {BATCH} images")
    add(
        "--batch-size",
        type=at_least(1),
        default=BATCH,
        metavar="N",
        help="images a step, of all processes (%(default)s)",
    )
    add("--lr", type=number_from(0), metavar="LR", help=f"peak learning rate (0.02 for {BATCH} images)")
    add("--weight-decay", type=number_from(0), default=1e-4, metavar="W", help="(%(default)g)")
    add("--warm-up", type=at_least(0), metavar="STEPS", help="of the learning rate (500, at most a tenth of all)")
    add(
        "--shorter",
        type=at_least(32),
        nargs="+",
        metavar="PIXELS",
        help="an image's shorter side; the last one to detect",
    )
    add("--longest", type=at_least(32), metavar="PIXELS", help="an image's longer side, at most")
    add("--width", type=at_least(8), default=Size.width, metavar="N", help="channels of the new layers (%(default)s)")
    add("--hidden", type=at_least(8), default=Size.hidden, metavar="N", help="width of the box head's fc (%(default)s)")
    add(
        "--rois",
        type=at_least(2),
        default=Size.rois,
        metavar="N",
        help="regions of an image to learn from (%(default)s)",
    )
    add("--amp", choices=["off", *AMP], default="off", help="mixed precision (%(default)s)")
    add("--workers", type=at_least(0), default=0, metavar="N", help="processes that read images (%(default)s)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="of new weights, order and --random (%(default)s)")
    add_run_arguments(result, out="runs/detection-BACKBONE-MODE", log_every=20)
    return result


def start(args: argparse.Namespace) -> Encoder:
    """The backbone to train on."""
    if args.image_size and not args.random:
        raise DataError("--image-size is for --random; trained weights say themselves what they are for")
    if args.random and args.image_size is None:
        args.image_size = 224
    directory, args.out = args.out, None  # where an encoder's own results would go
    encoder = encoder_of(args)
    args.out = directory
    return encoder


def complete(args: argparse.Namespace, found: InstanceSet, processes: int) -> None:
    """Fill in what follows from the schedule (`args.implied` names it), and refuse what does not go together."""
    args.implied = [name for name in ("lr", "warm_up", "shorter", "longest") if getattr(args, name) is None] + ["drops"]
    schedule, count = SCHEDULES[args.schedule], len(trainable(found.photos))
    if args.batch_size > count:
        raise DataError(
            f"--batch-size {args.batch_size} is larger than the {count} images of {found.name} with instances"
        )
    if args.batch_size % processes:
        raise DataError(
            f"--batch-size {args.batch_size} cannot be shared by {processes} processes: take a multiple of it"
        )
    if args.tensorboard:
        summary_writer()
    epochs, iterations = args.epochs, args.iterations
    if epochs is None and iterations is None:
        epochs, iterations = schedule.epochs, schedule.iterations
    args.steps = epochs * (count // args.batch_size) if epochs else max(1, round(iterations * BATCH / args.batch_size))
    args.lr = 0.02 * args.batch_size / BATCH if args.lr is None else args.lr
    args.warm_up = min(500, args.steps // 10) if args.warm_up is None else args.warm_up
    args.drops = [round(part * args.steps) for part in schedule.drops]
    largest = max(args.shorter or schedule.shorter)
    args.longest = args.longest or round(schedule.longest * largest / max(schedule.shorter))
    args.shorter = args.shorter or list(schedule.shorter)
    if args.longest < largest:
        raise DataError(f"--longest {args.longest} is less than --shorter {largest}")
