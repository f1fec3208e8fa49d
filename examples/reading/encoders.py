"""Frozen encoders to read out, by command line: of a run, torchvision's own weights, or random ones."""

from __future__ import annotations

import argparse
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from backbones import NAMES as BACKBONES
from backbones import cut, named, short
from command_line import Parser, at_least, device
from inputs.image_sets import Folder, Images
from inputs.images import NAMES, DataError, load, tell, with_labels
from inputs.loading import plain_batches
from pretraining import runs
from torch import Tensor, nn
from torchvision.models import get_model_weights

from reading.evaluate import stage_vectors

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # what torchvision's weights were trained with
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Encoder:
    """A backbone in eval mode, what its pixels are to be, and where what is read out of it goes."""

    name: str
    arch: str
    backbone: nn.Module
    stages: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    directory: Path
    settings: dict[str, Any]  # of its run
    checkpoint: str = ""  # the file's name without its ending, where it is not the run's newest weights


def add_start_arguments(parser: Parser) -> None:
    """Which encoder: what `encoder_of` reads."""
    add = parser.add_argument
    add(
        "run", type=Path, nargs="?", metavar="RUN", help="a run's directory, its backbone.pt, or one of its checkpoints"
    )
    add("--arch", type=named, metavar="NAME", help=f"the backbone, where there is no RUN: {BACKBONES}")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--weights", metavar="NAME", help="torchvision's of --arch: DEFAULT, IMAGENET1K_V1, ...; or a file"
    )
    start.add_argument("--random", action="store_true", help="random weights of --arch")


def add_arguments(parser: Parser) -> None:
    add_start_arguments(parser)
    add = parser.add_argument
    add("--data", metavar="NAME", help=f"{NAMES} (RUN's own, or digits)")
    add("--data-dir", type=Path, metavar="DIR", help="where torchvision's data sets are (RUN's own, or data)")
    add("--download", action="store_true", help="download the data set to --data-dir if it is not there")
    add(
        "--image-size", type=at_least(4), metavar="PIXELS", help="resize images (RUN's own; --weights 224, --random 32)"
    )
    add("--batch-size", type=at_least(1), default=256, metavar="N", help="images at a time (%(default)s)")
    add(
        "--workers",
        type=at_least(0),
        default=0,
        metavar="N",
        help="processes that read images from files (%(default)s)",
    )
    add(
        "--seed", type=at_least(0), default=0, metavar="N", help="of --random and of what is trained here (%(default)s)"
    )
    add("--device", type=device, help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    add("--threads", type=at_least(1), metavar="N", help="of the CPU (torch's choice)")
    add("--out", type=Path, metavar="DIR", help="where the results go (RUN's directory, or runs/ARCH-WEIGHTS)")


def encoder_of(args: argparse.Namespace) -> Encoder:
    """The encoder that the arguments name. Raises `DataError` in one line."""
    return _of_run(args) if args.run else _of_torchvision(args)


def chosen(args: argparse.Namespace) -> tuple[Encoder, Images | Folder]:
    """The encoder and the images that the arguments name, the encoder on its device."""
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    encoder = encoder_of(args)
    name = args.data or encoder.settings.get("data", "digits")
    directory = args.data_dir or Path(encoder.settings.get("data_dir", "data"))
    on_broken = encoder.settings.get("on_broken", "stop")
    images = load(name, directory, args.download, encoder.image_size, on_broken, args.workers)
    with_labels(tell(images))
    encoder.backbone.to(args.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    encoder.directory.mkdir(parents=True, exist_ok=True)
    return encoder, images


def vectors(
    args: argparse.Namespace, encoder: Encoder, images: Images | Folder, part: Literal["train", "test"]
) -> tuple[list[Tensor], Tensor]:
    """Each stage's vectors `[(N, C_k), ...]` of a part's images, unaugmented, and their labels `(N,)`, on the CPU."""
    batches = plain_batches(images, part, args.batch_size, args.device, encoder.mean, encoder.std, args.workers)
    count = len(images.train_labels if part == "train" else images.test_labels)
    return stage_vectors(encoder.backbone, encoder.stages, batches, count)


def about(args: argparse.Namespace, encoder: Encoder, images: Images | Folder) -> dict[str, Any]:
    """What results say of where they come from."""
    return {
        "encoder": encoder.name,
        "arch": encoder.arch,
        "checkpoint": encoder.checkpoint,
        "run": encoder.settings,
        "data": images.name,
        "image_size": images.size,
        "classes": images.classes,
        "train": len(images.train_labels),
        "test": len(images.test_labels),
        "seed": args.seed,
    }


def _of_run(args: argparse.Namespace) -> Encoder:
    if args.arch or args.weights or args.random:
        raise DataError(f"{args.run} says itself what it is: leave out --arch, --weights and --random")
    if not args.run.exists():
        raise DataError(f"there is no {args.run}")
    run = runs.load(args.run)
    directory = args.run if args.run.is_dir() else args.run.parent
    return Encoder(
        directory.name,
        run.settings["arch"],
        run.backbone,
        run.stages,
        args.image_size or run.settings["image_size"],
        run.mean,
        run.std,
        args.out or directory,
        run.settings,
        "" if args.run.is_dir() or args.run.name in runs.FORMATS.values() else args.run.stem,
    )


def _of_torchvision(args: argparse.Namespace) -> Encoder:
    if not args.arch or not (args.weights or args.random):
        raise DataError("nothing to read out: give a RUN, or --arch with --weights or --random")
    size = args.image_size or (224 if args.weights else 32)
    architecture, _ = cut(args.arch, 224 if args.weights else size)
    if args.random:
        torch.manual_seed(args.seed)
        backbone, statistics, weights = architecture.make(size), {"mean": HALF, "std": HALF}, f"random-{args.seed}"
    else:
        backbone, statistics, weights = architecture.make(224), IMAGENET, Path(args.weights).stem
        try:
            backbone.load_state_dict(_state_dict(args.arch, args.weights))
        except (RuntimeError, TypeError, AttributeError) as problem:
            raise DataError(f"{args.weights} does not hold the weights of torchvision's {args.arch}") from problem
    name = f"{short(args.arch)}-{weights}"
    directory = args.out or Path("runs", name)
    return Encoder(name, args.arch, backbone, architecture.stages, size, **statistics, directory=directory, settings={})


def _state_dict(arch: str, weights: str) -> dict[str, Tensor]:
    """Torchvision's weights by name, downloaded once, or a file of such."""
    if Path(weights).is_file():
        try:
            return torch.load(weights, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as problem:
            raise DataError(f"{weights} cannot be read as a file of weights") from problem
    try:
        published = get_model_weights(arch.removeprefix("torchvision:"))
        return published[weights].get_state_dict(progress=True, check_hash=True)
    except ValueError as problem:
        raise DataError(
            f"torchvision has no weights of {arch}: leave out --weights, or take one of its own"
        ) from problem
    except KeyError as problem:
        names = ", ".join(published.__members__)
        raise DataError(f"there is no file {weights}, and torchvision's weights of {arch} are {names}") from problem
    except (OSError, RuntimeError) as problem:
        raise DataError(f"{weights} of {arch} cannot be downloaded ({problem})") from problem
