r"""Pretrain a backbone by SimCLR, Greedy InfoMax or LoCo: `python examples/pretrain.py --data cifar10 --method loco`.

The paper's runs (Table 1) are, on 8 GPUs with ImageNet in data/imagenet,

    torchrun --nproc-per-node 8 examples/pretrain.py --data imagenet --data-dir data/imagenet --arch resnet50 \
        --method loco --epochs 800 --batch-size 4096 --warm-up 10 --sync-bn --amp bf16 --out runs/loco

which linear_eval.py reads out: SimCLR 69.8, Greedy InfoMax 64.7, LoCo 69.5. Without arguments it takes scikit-learn's
digits and a small network, and about two minutes on two cores. `--decoder` has the rows of Table 4, `--sharing` those of
Table 5. The paper compares LoCo with Greedy InfoMax under another decoder; here all methods have the same one unless told
otherwise, and the same initial weights, images and views.

Writes run.json, log.jsonl, checkpoints and the backbone's plain weights to `--out`, see runs.py. With `--resume auto` a run
that was killed at any moment ends, on the same machine, with the same bits as one that was not.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from backbones import ARCHITECTURES
from collapse import DivergedError, Watch
from command_line import Parser, at_least, device, number_from
from draws import DROPOUT, Draws, seed_of
from images import NAMES, DataError, Images, load
from interrupt import interruptible
from loading import view_batches
from methods import DECODERS, DEPTHS, LOSSES, METHODS, SHARINGS, overlap_of
from optimisers import RECIPES
from processes import Processes
from progress import Progress, summary_writer
from runs import (
    FORMATS,
    UNREADABLE,
    cut_log,
    newest_checkpoint,
    read_log,
    read_settings,
    save_backbone,
    save_checkpoint,
    write_settings,
)
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from training import AMP, Training, local_gradients, new_training
from views import Views, grey_views, simclr_views

import locallearn

DEFAULT_ARCH = "presnet_small" if "presnet_small" in ARCHITECTURES else "resnet18"
DIGITS = 32  # pixels a side: 8 leave nothing to stages that halve them
MEAN = STD = (0.5, 0.5, 0.5)  # what views.scaled takes off and divides by


def views_of(images: Images) -> Views:
    """Random views that suit the data set: handwriting is neither flipped nor cropped."""
    return grey_views if images.channels == 1 else simclr_views(images.size)


def train(args: argparse.Namespace, processes: Processes, images: Images, training: Training, steps: int) -> bool:
    """Train up to `steps`; returns whether it came so far, and was not told to stop."""
    model, count, units = training.model, len(images.train_labels), len(training.model.plan.units)
    first, before = training.step, training.seconds
    parallel = None
    if processes.size > 1:
        parallel = DistributedDataParallel(
            model, device_ids=[args.device.index] if args.device.type == "cuda" else None
        )
    draws = Draws(count, args.batch_size, steps, args.seed, first, args.accumulate, processes.rank, processes.size)
    batches = view_batches(images, draws, views_of(images), args.device, 2, args.workers, args.augment_on)
    progress = Progress(args.out, steps, first, before, args.batch_size, args.device, args.tensorboard, processes.leads)
    watch, saved, stop = Watch(units, args.device), time.perf_counter(), False
    with interruptible() as asked, progress:
        while training.step < steps and not stop:
            seen: list[Tensor] = []
            for micro_batch in range(args.accumulate):
                views, labels = next(batches)
                views = [view.contiguous(memory_format=torch.channels_last) for view in views]
                part = processes.rank * args.accumulate + micro_batch
                torch.manual_seed(seed_of(args.seed, training.step, DROPOUT + part))
                last = micro_batch == args.accumulate - 1
                seen.append(local_gradients(args, training, parallel, views, labels, last))
            lr = training.update()
            progress.step()
            means = torch.stack(seen).mean(dim=0)  # (3, units)
            watch.see(means[0])
            stop = asked() and processes.size == 1  # several processes agree on it when they log

            if training.step % args.log_every == 0 or training.step == steps:
                told = processes.mean(torch.cat([means.flatten(), means.new_tensor([asked()])])).tolist()
                stop = stop or told[-1] > 0
                losses, accuracy, std = (told[k * units : (k + 1) * units] for k in range(3))
                line = {"step": training.step, "epoch": training.step / (count // args.batch_size), "losses": losses}
                line |= {"accuracy": accuracy, "std": std, "lr": lr}
                if model.penalty is not None:
                    line["penalty"] = model.penalty.item()
                progress.record(line)
                settled = training.step > args.warm_up * (count // args.batch_size)  # at random, a deep net says little
                for problem in watch.judge(std if settled else [1.0] * units):
                    progress.warn(f"step {training.step}: {problem}")

            due = args.checkpoint_every.due(training.step, time.perf_counter() - saved)
            if processes.leads and (due or stop or training.step == steps) and watch.healthy:
                training.seconds = progress.seconds
                save_checkpoint(args.out, training.step, training.state())
                saved = time.perf_counter()
    if not watch.healthy:
        raise DivergedError(
            f"the losses of step {training.step} are not finite; the checkpoint before is in {args.out}"
        )
    return training.step == steps


# ------------------------------------------------------------------------------------------------- from start to finish


def run(args: argparse.Namespace, argv: list[str]) -> int:
    processes = Processes.of_torchrun()
    args.device = processes.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    images = load(
        args.data, args.data_dir, args.download, args.image_size or (DIGITS if args.data == "digits" else None)
    )
    complete(args, processes, images)
    steps = args.epochs * (len(images.train_labels) // args.batch_size)
    settings = settings_of(args, processes, images)
    if is_finished(args, settings):
        if processes.leads:
            print(f"{args.out} is finished")
        return 0
    try:
        training = new_training(args, images.size, steps)
    except ValueError as problem:
        raise DataError(f"{args.arch} cannot be trained so: {problem}") from problem
    checkpoint = newest_checkpoint(args.out)
    if checkpoint is not None:
        try:
            training.restore(checkpoint)
        except UNREADABLE as problem:
            raise DataError(f"the newest checkpoint of {args.out} is not one of this run") from problem
        del checkpoint

    with processes.joined(args.device):
        if processes.mean(torch.tensor(float(training.step), device=args.device)) != training.step:
            raise DataError(
                f"the processes found different checkpoints: {args.out} must be one directory for all of them"
            )
        if processes.leads:
            write_settings(args.out, settings | about(args, training))
            cut_log(args.out, training.step)
            print(
                f"{images.name}, {len(images.train_labels)} images of {images.size} pixels; the plan, a line per loss:"
            )
            print(training.model.plan)
        came_to_the_end = train(args, processes, images, training, steps)
        if not processes.leads:
            return 0
    if not came_to_the_end:
        again = shlex.join(["python", "examples/pretrain.py", *argv, *([] if args.resume else ["--resume", "auto"])])
        print(f"\nstopped and saved after step {training.step} of {steps}; go on with: {again}", file=sys.stderr)
        return 130
    path = save_backbone(args.out, training.model.backbone, args.format)
    speed = steps * args.batch_size / training.seconds
    write_settings(
        args.out, settings | about(args, training) | {"seconds": training.seconds, "images_per_second": speed}
    )
    last = read_log(args.out)[-1]
    print("| method | arch | decoder | sharing | epochs | losses | top-1 of the pairs, % | images/s | seconds |")
    print("|---|---|---|---|--:|---|---|--:|--:|")
    cells = [args.method, args.arch, args.decoder, args.sharing, args.epochs]
    cells += [" ".join(f"{loss:.2f}" for loss in last["losses"]), " ".join(f"{100 * a:.0f}" for a in last["accuracy"])]
    print("|", " | ".join(map(str, [*cells, f"{speed:,.0f}", f"{training.seconds:.0f}"])), "|")
    print(f"wrote {path}; read it out with: python examples/linear_eval.py {shlex.quote(str(args.out))}")
    return 0


def complete(args: argparse.Namespace, processes: Processes, images: Images) -> None:
    """Fill in what follows from other arguments, and refuse what does not go together."""
    count, parts = len(images.train_labels), processes.size * args.accumulate
    stages = ARCHITECTURES[args.arch].stages
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
    args.out = args.out or Path("runs", f"{images.name}-{args.arch}-{args.method}")


RESULTS_DEPEND_ON = (
    *("data", "method", "overlap", "arch", "decoder", "sharing", "loss", "temperature", "epochs", "batch_size"),
    *(
        "optimizer",
        "lr",
        "weight_decay",
        "warm_up",
        "accumulate",
        "amp",
        "norm",
        "sync_bn",
        "augment_on",
        "seed",
        "log_every",
    ),
)


def settings_of(args: argparse.Namespace, processes: Processes, images: Images) -> dict[str, Any]:
    """What a run's results depend on."""
    chosen = {name: getattr(args, name) for name in RESULTS_DEPEND_ON}
    return chosen | {"image_size": images.size, "mean": list(MEAN), "std": list(STD), "processes": processes.size}


def about(args: argparse.Namespace, training: Training) -> dict[str, Any]:
    """What else is worth knowing of a run."""
    gpu = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "cpu"
    return {
        "data_dir": str(args.data_dir),
        "units": [[unit.first, unit.last] for unit in training.model.plan.units],
        "versions": {
            "locallearn": locallearn.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": f"{gpu}, {torch.get_num_threads()} threads, {platform.machine()}",
        "commit": commit(),
    }


def commit() -> str | None:
    """Of this repository, with "-dirty" after it where files were changed; `None` where there is none."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def is_finished(args: argparse.Namespace, settings: dict[str, Any]) -> bool:
    """Whether `--out` holds this run with its end. Raises `DataError` for another run, or one that was not to be resumed."""
    if not (args.out / "run.json").exists():
        args.out.mkdir(parents=True, exist_ok=True)
        return False
    before = read_settings(args.out)
    if not args.resume:
        raise DataError(f"{args.out} holds a run already: go on with it by --resume auto, or choose another --out")
    if changed := [
        f"{name} {before.get(name)}, not {value}" for name, value in settings.items() if before.get(name) != value
    ]:
        raise DataError(f"{args.out} holds a run with other settings: {'; '.join(changed)}")
    return "seconds" in before


# ----------------------------------------------------------------------------------------------------------- arguments


class Every(NamedTuple):
    """When a checkpoint is due: after so many steps, or so much time."""

    steps: int | None = None
    seconds: float | None = None

    def due(self, step: int, seconds: float) -> bool:
        """At a step, `seconds` after the last checkpoint."""
        return step % self.steps == 0 if self.steps else seconds >= self.seconds


def every(text: str) -> Every:
    """A type for arguments: 500 (steps) or 10min."""
    try:
        if text.endswith("min"):
            return Every(seconds=60 * number_from(0, above=True)(text.removesuffix("min")))
        return Every(steps=at_least(1)(text))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected steps such as 500 or minutes such as 10min, got {text!r}") from None


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
    add("--image-size", type=at_least(4), metavar="PIXELS", help=f"resize images (as they are; digits: {DIGITS})")
    how_far = result.add_mutually_exclusive_group()
    how_far.add_argument("--method", choices=METHODS, help="how far each loss reaches (loco)")
    how_far.add_argument(
        "--overlap", type=int, metavar="N", help="stages that neighbouring units share, in place of --method"
    )
    add("--arch", choices=list(ARCHITECTURES), default=DEFAULT_ARCH, help="the backbone (%(default)s)")
    add("--decoder", choices=[*DECODERS, *DEPTHS], default="conv", help="the rows of Table 4 (%(default)s)")
    add("--sharing", choices=SHARINGS, default="hard", help="the rows of Table 5 (%(default)s)")
    add("--loss", choices=list(LOSSES), default="nt-xent", help="of the units; supcon takes labels (%(default)s)")
    add("--temperature", type=number_from(0, above=True), default=0.1, metavar="T", help="of the loss (%(default)s)")
    add("--epochs", type=at_least(1), default=10, metavar="N", help="passes over the images (%(default)s)")
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
    add(
        "--compile", action="store_true", help="compile the decoders; hooks inside of a compiled backbone would not run"
    )
    add("--augment-on", choices=["device", "worker"], default="device", help="where views are made (%(default)s)")
    add("--workers", type=at_least(0), default=0, metavar="N", help="processes that read images (%(default)s)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="of weights, views and order (%(default)s)")
    add("--device", type=device, help="cpu, cuda, cuda:1, ... (cuda where there is one, one GPU per process)")
    add("--threads", type=at_least(1), metavar="N", help="of the CPU (torch's choice)")
    add("--out", type=Path, metavar="DIR", help="where the run goes (runs/DATA-ARCH-METHOD)")
    add("--resume", choices=["auto"], help="auto: go on after the newest good checkpoint in --out, if there is one")
    add(
        "--checkpoint-every",
        type=every,
        default=every("10min"),
        metavar="N",
        help="steps, or minutes as in 10min (10min)",
    )
    add("--log-every", type=at_least(1), default=10, metavar="STEPS", help="(%(default)s)")
    add("--tensorboard", action="store_true", help="write for it too, to --out/tensorboard")
    add("--format", choices=list(FORMATS), default="pt", help="of the backbone's weights (%(default)s)")
    return result


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    # a step that the scaler skips, as fp16's first ones often are, is none of the optimiser's
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step\\(\\)` before", category=UserWarning)
    arguments = parser()
    args = arguments.parse_args(argv)
    try:
        return run(args, argv)
    except (DataError, DivergedError) as problem:
        message = str(problem)
    except OSError as problem:
        message = f"cannot read or write {problem.filename or args.out}: {problem.strerror or problem}"
    except KeyboardInterrupt:
        print("\nstopped; --resume auto goes on from the last checkpoint, if there is one", file=sys.stderr)
        return 130
    if Processes.of_torchrun().leads:  # it says it for all
        arguments.error(message)
    return 2


if __name__ == "__main__":
    sys.exit(main())
