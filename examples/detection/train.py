r"""Mask R-CNN on a locally learned backbone: `python examples/detection/train.py runs/loco --data data/coco`.

Table 2: whole backbone frozen, COCO at 1x or 64 epochs of Cityscapes; box AP / mask AP of a ResNet-50 after 800 epochs of
pretraining: SimCLR 34.8/32.2, GIM 29.3/27.0, LoCo 34.5/32.0, supervised 33.9/31.3 on COCO. On 8 GPUs:

    torchrun --nproc-per-node 8 examples/detection/train.py runs/loco --data data/coco --amp bf16 --workers 8
    torchrun --nproc-per-node 8 examples/detection/train.py runs/loco --data data/cityscapes --schedule cityscapes \
        --batch-size 8

Table 3: few labels, conv1 and res2 frozen, multi-scale; nothing frozen for the random start:

    python examples/detection/splits.py --data data/coco
    torchrun ... examples/detection/train.py runs/loco --data data/coco --mode finetune --schedule coco-1k \
        --split splits/COCO-1K-seed0.json
    torchrun ... examples/detection/train.py --arch resnet50 --random --data data/coco --mode scratch --schedule coco-1k ...

"Supervised" is `--arch resnet50 --weights IMAGENET1K_V1` in the place of a run. What differs from the paper: torchvision's
Mask R-CNN in place of mmdetection's, so RoIs are matched and sampled, and the box loss is weighted, as torchvision does;
Cityscapes is evaluated as COCO is. On a CPU, BatchNorm takes SyncBatchNorm's place.

Writes run.json, log.jsonl, checkpoints, detector.pt and results.json to `--out`. With `--resume auto` a run that was killed
goes on; on a CPU it ends with the same bits as one that was not.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import stoppable

import torch
from batches import Targets, trainable, training_batches
from command_line import status_of, write
from detector import LOSSES, Size, mask_rcnn
from inputs.images import DataError
from instances import InstanceSet
from options import RESULTS_DEPEND_ON, complete, parser, start
from precision import average_precision
from pretraining.draws import DROPOUT, Draws, seed_of
from pretraining.interrupt import interruptible
from pretraining.processes import Processes
from pretraining.progress import Progress
from pretraining.run_options import RESUMES
from pretraining.runs import (
    commit,
    cut_log,
    is_finished,
    save_checkpoint,
    take_up,
    write_settings,
)
from pretraining.training import AMP, scaler_for
from reading.encoders import Encoder
from reports import print_results, save_json
from sets import load_part
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from locallearn.diagnosis import DivergedError

WARM_UP_FROM = 1e-3  # of the learning rate, as in mmdetection


@dataclass
class Training:
    """What a step changes, and so what a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    step: int = 0
    seconds: float = 0.0

    def state(self) -> dict[str, Any]:
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        return {"step": self.step, "seconds": self.seconds, **parts}

    def restore(self, state: dict[str, Any]) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        for name, part in self._parts.items():
            part.load_state_dict(state[name])

    @property
    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}


def new_training(args: argparse.Namespace, encoder: Encoder, classes: int) -> Training:
    torch.manual_seed(args.seed)
    size = Size(args.width, args.hidden, args.rois, tuple(args.shorter), args.longest)
    model = mask_rcnn(encoder, classes, args.mode, size, args.device)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)

    def factor(step: int) -> float:
        warm = min(1, WARM_UP_FROM + (1 - WARM_UP_FROM) * step / args.warm_up) if args.warm_up else 1
        return warm * 0.1 ** sum(step >= drop for drop in args.drops)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return Training(model, optimizer, scheduler, scaler_for(args.device, args.amp))


def step(
    args: argparse.Namespace, training: Training, model: nn.Module, images: list[Tensor], targets: Targets
) -> Tensor:
    """One step of the optimiser; returns the losses, in the order of `LOSSES`."""
    autocast = torch.autocast(args.device.type, AMP[args.amp]) if args.amp in AMP else nullcontext()
    with autocast:
        losses = model(images, targets)
    ordered = torch.stack([losses[name].float() for name in LOSSES])
    training.scaler.scale(ordered.sum()).backward()
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.optimizer.zero_grad()
    training.scheduler.step()
    training.step += 1
    return ordered.detach()


def train(args: argparse.Namespace, processes: Processes, found: InstanceSet, training: Training) -> bool:
    """Train up to the last step; returns whether it came so far, and was not told to stop."""
    photos, rank = trainable(found.photos), processes.rank
    model: nn.Module = training.model.train()
    if processes.size > 1:
        model = DistributedDataParallel(model, device_ids=[args.device.index] if args.device.type == "cuda" else None)
    draws = Draws(
        len(photos), args.batch_size, args.steps, args.seed, training.step, process=rank, processes=processes.size
    )
    batches = training_batches(photos, draws, args.device, args.workers)
    progress = Progress(
        *(args.out, args.steps, training.step, training.seconds, args.batch_size, args.device, args.tensorboard),
        leads=processes.leads,
    )
    saved, stop, healthy = time.perf_counter(), False, True
    with interruptible() as asked, progress:
        while training.step < args.steps and not stop:
            images, targets = next(batches)
            torch.manual_seed(
                seed_of(args.seed, training.step, DROPOUT + rank)
            )  # of what the model draws: RoIs, scales
            lr = training.optimizer.param_groups[0]["lr"]
            losses = step(args, training, model, images, targets)
            progress.step()
            stop = asked() and processes.size == 1  # several processes agree on it when they log
            if training.step % args.log_every == 0 or training.step == args.steps:
                told = processes.mean(torch.cat([losses, losses.new_tensor([asked()])])).tolist()
                stop, healthy = stop or told[-1] > 0, all(map(isfinite, told))
                epoch = training.step / (len(photos) // args.batch_size)
                progress.record({"step": training.step, "epoch": epoch, "losses": told[:-1], "lr": lr})
            if not healthy:
                raise DivergedError(
                    f"the losses of step {training.step} are not finite; the checkpoint before is in {args.out}"
                )
            due = args.checkpoint_every.due(training.step, time.perf_counter() - saved)
            if processes.leads and (due or stop or training.step == args.steps) and bool(losses.isfinite().all()):
                training.seconds = progress.seconds
                save_checkpoint(args.out, training.step, training.state())
                saved = time.perf_counter()
    return training.step == args.steps


def run(args: argparse.Namespace, argv: list[str]) -> int:
    processes = Processes.of_torchrun()
    args.device = processes.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    encoder = start(args)
    args.out = args.out or Path("runs", f"detection-{encoder.name}-{args.mode}")
    found = load_part(args, "train", processes.leads)
    held_out = load_part(args, "val", processes.leads)
    if found.classes != held_out.classes:
        raise DataError(f"{found.name} and {held_out.name} must have the same categories")
    complete(args, found, processes.size)
    settings = settings_of(args, processes, encoder, found)
    if is_finished(args.out, settings, resume=bool(args.resume), implied=args.implied):
        if processes.leads:
            print(f"{args.out} is finished")
        return 0
    training = new_training(args, encoder, len(found.classes))
    take_up(args.out, training, args.steps)
    with processes.joined(args.device):
        if processes.mean(torch.tensor(float(training.step), device=args.device)) != training.step:
            raise DataError(f"the processes found different checkpoints: {args.out} must be one directory for all")
        about = {"classes": list(found.classes), "commit": commit(), "problems": found.problems.counts}
        if processes.leads:
            write_settings(args.out, settings | about)
            cut_log(args.out, training.step)
            weights = sum(weight.numel() for weight in training.model.parameters() if weight.requires_grad)
            images = f"{len(trainable(found.photos))} images of {found.name}"
            print(f"{images}; {args.steps} steps of {args.batch_size}; {weights:,} weights are trained")
        if not train(args, processes, found, training):
            again = ["examples/detection/train.py", *argv, *([] if args.resume else ["--resume", "auto"])]
            if processes.leads:
                print(
                    f"\nstopped and saved after step {training.step}; go on with: python {shlex.join(again)}",
                    file=sys.stderr,
                )
            return 130
        measured = average_precision(training.model, held_out, args.device, processes, args.workers)
    if processes.leads:
        finish(args, training, settings | about, held_out, measured)
    return 0


def finish(
    args: argparse.Namespace,
    training: Training,
    settings: dict[str, Any],
    held_out: InstanceSet,
    measured: dict[str, dict[str, float]],
) -> None:
    """Write the detector's weights, what it reached and how long it took; print the table."""
    weights = {name: value.cpu() for name, value in training.model.state_dict().items()}
    write(args.out / "detector.pt", lambda path: torch.save(weights, path))
    results = measured | {name: settings[name] for name in ("backbone", "mode", "schedule", "seed", "steps")}
    results |= {"data": held_out.name, "images": len(held_out.photos), "problems": held_out.problems.counts}
    results["seconds"] = training.seconds
    save_json(args.out / "results.json", results)
    write_settings(args.out, settings | {"seconds": training.seconds})
    print_results([results])


def settings_of(args: argparse.Namespace, processes: Processes, encoder: Encoder, found: InstanceSet) -> dict[str, Any]:
    """What a run's results depend on."""
    chosen = {name: getattr(args, name) for name in RESULTS_DEPEND_ON}
    backbone = {"backbone": encoder.name, "arch": encoder.arch, "image_size": encoder.image_size}
    backbone |= {
        "stages": list(encoder.stages),
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "norm": encoder.settings.get("norm", "batch"),
    }
    data = {"data": found.name, "split": args.split.stem if args.split else None, "train_images": len(found.photos)}
    return {"task": "detection", **backbone, **data, **chosen, "processes": processes.size}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return status_of(parser(), lambda args: run(args, argv), argv, RESUMES)


if __name__ == "__main__":
    sys.exit(main())
