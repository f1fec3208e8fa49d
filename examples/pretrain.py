r"""Pretrain a backbone by SimCLR, Greedy InfoMax or LoCo: `python examples/pretrain.py --data cifar10 --method loco`.

The paper's runs (Table 1) are, on 8 GPUs with ImageNet in data/imagenet,

    torchrun --nproc-per-node 8 examples/pretrain.py --data imagenet --data-dir data/imagenet --arch resnet50 \
        --method loco --epochs 800 --batch-size 4096 --warm-up 10 --sync-bn --amp bf16 --workers 8 --out runs/loco

which linear_eval.py reads out: SimCLR 69.8, Greedy InfoMax 64.7, LoCo 69.5. Without arguments it takes scikit-learn's
digits and a small network, and about two minutes on two cores. `--decoder` has the rows of Table 4, `--sharing` those of
Table 5. The paper compares LoCo with Greedy InfoMax under another decoder; here all methods have the same one unless told
otherwise, and the same initial weights, images and views.

Writes run.json, log.jsonl, checkpoints and the backbone's plain weights to `--out`, see runs.py. With `--resume auto` a run
that was killed at any moment goes on; on a CPU it ends with the same bits as one that was not.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import time
from typing import Any

import stoppable

import torch
from command_line import status_of
from inputs.images import DataError, Images, load, tell, without_labels
from inputs.loading import view_batches
from inputs.views import Views, grey_views, simclr_views
from pretraining.draws import DROPOUT, Draws, seed_of
from pretraining.interrupt import interruptible
from pretraining.pretrain_options import DIGITS, RESULTS_DEPEND_ON, complete, parser
from pretraining.processes import Processes
from pretraining.progress import Progress
from pretraining.run_options import RESUMES
from pretraining.runs import (
    commit,
    cut_log,
    is_finished,
    read_log,
    save_backbone,
    save_checkpoint,
    take_up,
    write_settings,
)
from pretraining.training import Training, local_gradients, new_training
from rich.box import SIMPLE_HEAVY
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import locallearn
from locallearn.diagnosis import DivergedError, Watch

MEAN = STD = (0.5, 0.5, 0.5)  # what views.scaled takes off and divides by
PATIENCE = 5  # steps in a row without a finite loss, after which a run is lost


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
    watch, saved, stop = Watch(units), time.perf_counter(), False
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
                for problem in watch.judge(std if settled else [None] * units, patience=PATIENCE):
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
    size = args.image_size or (DIGITS if args.data == "digits" else None)
    images = load(args.data, args.data_dir, args.download, size, args.on_broken, args.workers)
    if processes.leads:
        tell(images)
    complete(args, processes, images)
    steps = args.epochs * (len(images.train_labels) // args.batch_size)
    settings = settings_of(args, processes, images)
    if is_finished(args.out, settings, resume=bool(args.resume), implied=args.implied):
        if processes.leads:
            print(f"{args.out} is finished")
        return 0
    try:
        training = new_training(args, images.size, steps)
    except ValueError as problem:
        raise DataError(f"{args.arch} cannot be trained so: {problem}") from problem
    take_up(args.out, training, steps)
    with processes.joined(args.device):
        if processes.mean(torch.tensor(float(training.step), device=args.device)) != training.step:
            raise DataError(f"the processes found different checkpoints: {args.out} must be one directory for all")
        if processes.leads:
            write_settings(args.out, settings | about(args, training))
            cut_log(args.out, training.step)
            count = len(images.train_labels)
            print(
                f"{images.name}, {count} images of {images.size} pixels; the plan, a line per loss:\n{training.model.plan}"
            )
        came_to_the_end = train(args, processes, images, training, steps)
    if not came_to_the_end:
        launcher = ["python"] if processes.size == 1 else ["torchrun", "--nproc-per-node", str(processes.size)]
        again = shlex.join([*launcher, "examples/pretrain.py", *argv, *([] if args.resume else ["--resume", "auto"])])
        if processes.leads:
            print(f"\nstopped and saved after step {training.step} of {steps}; go on with: {again}", file=sys.stderr)
        return 130
    if processes.leads:
        finish(args, training, images, settings, speed=steps * args.batch_size / training.seconds)
    return 0


def finish(
    args: argparse.Namespace, training: Training, images: Images, settings: dict[str, Any], speed: float
) -> None:
    """Write the plain weights and what the run took; print what its units came to and what comes next."""
    path = save_backbone(args.out, training.model.backbone, args.format)
    took = {"seconds": training.seconds, "images_per_second": speed}
    write_settings(args.out, settings | about(args, training) | took)
    show(args, training, speed)
    again = f"python examples/linear_eval.py {shlex.quote(str(args.out))}"
    if without_labels(images):
        print(f"wrote {path}; read it out on labelled images, by their NAME: {again} --data NAME")
    else:
        print(f"wrote {path}; read it out with: {again}")


def show(args: argparse.Namespace, training: Training, speed: float) -> None:
    """A line for each unit: how far it reaches, and what was logged of it last."""
    last, table = read_log(args.out)[-1], Table(box=SIMPLE_HEAVY)
    for heading in ("unit", "up to", "loss", "top-1, %"):
        table.add_column(heading, justify="left" if heading == "up to" else "right", no_wrap=True)
    for k, unit in enumerate(training.model.plan.units):
        numbers = f"{last['losses'][k]:.2f}", f"{100 * last['accuracy'][k]:.0f}"
        table.add_row(str(k), args.stages[unit.last], *numbers)
    console = Console()
    about = f"{args.arch}, decoder {args.decoder}, sharing {args.sharing}, {args.epochs} epochs"
    console.print(f"{args.method}: {about}", style="bold", highlight=False)
    console.print(table)
    took = f"{speed:,.0f} images/s, {training.seconds:.0f} seconds"
    console.print(f"Loss and top-1 on the views of step {last['step']}. {took}.", style="dim", highlight=False)


def settings_of(args: argparse.Namespace, processes: Processes, images: Images) -> dict[str, Any]:
    """What a run's results depend on."""
    chosen = {name: getattr(args, name) for name in RESULTS_DEPEND_ON}
    return chosen | {
        "train_images": images.mark,
        "image_size": images.size,
        "mean": list(MEAN),
        "std": list(STD),
        "processes": processes.size,
    }


def about(args: argparse.Namespace, training: Training) -> dict[str, Any]:
    """What else is worth knowing of a run."""
    gpu = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "cpu"
    return {
        "data_dir": str(args.data_dir),
        "on_broken": args.on_broken,
        "units": [[unit.first, unit.last] for unit in training.model.plan.units],
        "versions": {
            "locallearn": locallearn.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": f"{gpu}, {torch.get_num_threads()} threads, {platform.machine()}",
        "commit": commit(),
    }


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return status_of(parser(), lambda args: run(args, argv), argv, RESUMES)


if __name__ == "__main__":
    sys.exit(main())
