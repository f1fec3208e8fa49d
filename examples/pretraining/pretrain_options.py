"""The command line of pretrain.py: its options, what follows from them, and what does not go together."""

from __future__ import annotations

import argparse
from pathlib import Path

from backbones import NAMES as BACKBONES
from backbones import cut, named, short
from command_line import Parser, at_least, number_from
from inputs.images import NAMES, DataError, Images

from pretraining.methods import DECODERS, DEPTHS, LOSSES, METHODS, SHARINGS, overlap_of
from pretraining.optimisers import RECIPES
from pretraining.processes import Processes
from pretraining.progress import summary_writer
from pretraining.run_options import add_run_arguments
from pretraining.runs import FORMATS
from pretraining.training import AMP

DEFAULT_ARCH = "presnet_small"
DIGITS = 32  # pixels a side: 8 leave nothing to stages that halve them

RESULTS_DEPEND_ON = (
    *("data", "method", "overlap", "arch", "stages", "decoder", "sharing", "loss", "temperature", "norm", "sync_bn"),
    *("amp", "optimizer", "lr", "weight_decay", "warm_up", "epochs", "batch_size", "accumulate", "augment_on"),
    *("seed", "log_every"),
)
# by others, where they are not said:
IMPLIED = ("overlap", "method", "stages", "decoder", "lr", "weight_decay", "warm_up")


def parser() -> Parser:
    result = Parser(
        description="Pretrain a backbone by SimCLR, Greedy InfoMax or LoCo.",
        epilog="example: python examples/pretrain.py --data cifar10 --download --arch resnet18 --epochs 100 --batch-size 512",
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
    add(
        "--on-broken",
        choices=["stop", "skip"],
        default="stop",
        help="images in files that cannot be read: stop at one, or leave all out, which reads large sets once (%(default)s)",
    )
    add("--image-size", type=at_least(4), metavar="PIXELS", help=f"resize images (as they are; digits: {DIGITS})")
    how_far = result.add_mutually_exclusive_group()
    how_far.add_argument("--method", choices=METHODS, help="how far each loss reaches (loco)")
    how_far.add_argument(
        "--overlap", type=int, metavar="N", help="stages that neighbouring units share, in place of --method"
    )
    add(
        "--arch",
        type=named,
        default=DEFAULT_ARCH,
        metavar="NAME",
        help=f"the backbone: {BACKBONES} (%(default)s)",
    )
    add(
        "--stages",
        nargs="+",
        metavar="STAGE",
        help="submodules after which the stages end, or auto, as `locallearn plan` chooses them (those of the backbone; auto)",
    )
    add("--decoder", choices=[*DECODERS, *DEPTHS], help="the rows of Table 4, and others (conv; of tokens, tokens)")
    add("--sharing", choices=SHARINGS, default="hard", help="the rows of Table 5 (%(default)s)")
    add("--loss", choices=list(LOSSES), default="nt-xent", help="of the units; supcon takes labels (%(default)s)")
    add("--temperature", type=number_from(0, above=True), default=0.1, metavar="T", help="of the loss (%(default)s)")
    add("--epochs", type=at_least(1), default=20, metavar="N", help="passes over the images (%(default)s)")
    add(
        "--batch-size", type=at_least(2), default=128, metavar="N", help="images a step, of all processes (%(default)s)"
    )
    add(
        "--accumulate",
        type=at_least(1),
        default=1,
        metavar="K",
        help="micro-batches a step, each with its own negatives",
    )
    rates = ", ".join(f"{name} {recipe.lr:g}" for name, recipe in RECIPES.items())
    add("--optimizer", choices=list(RECIPES), default="lars", help="(%(default)s)")
    add("--lr", type=number_from(0), metavar="LR", help=f"peak learning rate (batch size / 256 times: {rates})")
    decays = ", ".join(f"{name} {recipe.weight_decay:g}" for name, recipe in RECIPES.items())
    add("--weight-decay", type=number_from(0), metavar="W", help=f"not of biases and normalisation layers ({decays})")
    add("--warm-up", type=number_from(0), metavar="EPOCHS", help="of the learning rate (a tenth of all, at most 10)")
    add("--amp", choices=["off", *AMP], default="off", help="mixed precision (%(default)s)")
    add("--norm", choices=["batch", "group"], default="batch", help="GroupNorm in place of BatchNorm (%(default)s)")
    add("--sync-bn", action="store_true", help="BatchNorm over the images of all processes; on GPUs")
    add("--compile", action="store_true", help="compile the decoders (not the backbone, which is cut by hooks)")
    add("--augment-on", choices=["device", "worker"], default="device", help="where views are made (%(default)s)")
    add("--workers", type=at_least(0), default=0, metavar="N", help="processes that read images (%(default)s)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="of weights, views and order (%(default)s)")
    add_run_arguments(result, out="runs/DATA-ARCH-METHOD", log_every=10)
    add("--format", choices=list(FORMATS), default="pt", help="of the backbone's weights (%(default)s)")
    return result


def complete(args: argparse.Namespace, processes: Processes, images: Images) -> None:
    """Fill in what follows from other arguments (`args.implied` names it), and refuse what does not go together."""
    args.implied = [
        name
        for name in ("overlap", "method", "stages", "decoder", "lr", "weight_decay", "warm_up")
        if getattr(args, name) is None
    ]
    count, parts = len(images.train_labels), processes.size * args.accumulate
    args.stages = None if args.stages == ["auto"] else args.stages
    found, decoder = cut(args.arch, images.size, args.stages)
    stages, args.stages, args.decoder = found.stages, list(found.stages), args.decoder or decoder
    args.overlap = overlap_of(args.method or "loco", len(stages)) if args.overlap is None else args.overlap
    args.method = args.method or {0: "gim", 1: "loco", len(stages) - 1: "simclr"}.get(
        args.overlap, f"overlap-{args.overlap}"
    )
    if args.batch_size > count:
        raise DataError(f"--batch-size {args.batch_size} is larger than the {count} images of {images.name}")
    if args.batch_size % parts or args.batch_size < 2 * parts:
        raise DataError(
            f"--batch-size {args.batch_size} cannot be shared by {processes.size} processes, each with --accumulate "
            f"{args.accumulate}: take a multiple of {parts} from {2 * parts} up, or fewer processes"
        )
    if args.sync_bn and (args.device.type != "cuda" or args.norm != "batch"):
        raise DataError("--sync-bn is for BatchNorm on GPUs; --norm group needs no synchronising and runs anywhere")
    if args.tensorboard:
        summary_writer()
    recipe = RECIPES[args.optimizer]
    args.lr = recipe.lr * args.batch_size / 256 if args.lr is None else args.lr
    args.weight_decay = recipe.weight_decay if args.weight_decay is None else args.weight_decay
    args.warm_up = min(10, args.epochs / 10) if args.warm_up is None else args.warm_up
    if args.warm_up > args.epochs:
        raise DataError(f"--warm-up {args.warm_up:g} is longer than the {args.epochs} epochs of the run")
    args.out = args.out or Path("runs", f"{images.name}-{short(args.arch)}-{args.method}")
