"""A backbone with all that trains it: decoders, optimiser, schedule; one step, and its state for a checkpoint."""

from __future__ import annotations

import argparse
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from backbones import FEATURES, architecture
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from locallearn import LocalWrapper
from locallearn.diagnosis import Monitor
from pretraining.methods import LABELLED, wrapped
from pretraining.norms import by_groups
from pretraining.optimisers import optimizer, warm_up_and_cosine

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Training:
    """What a step changes, and so what a checkpoint holds."""

    model: LocalWrapper
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    monitor: Monitor | None = None
    step: int = 0
    seconds: float = 0.0

    def update(self) -> float:
        """Take the gradients up and clear them; returns the learning rate that was taken."""
        lr = self.optimizer.param_groups[0]["lr"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.step += 1
        return lr

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            **{name: part.state_dict() for name, part in self._parts.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        for name, part in self._parts.items():
            part.load_state_dict(state[name])

    @property
    def _parts(self) -> dict[str, Any]:
        return {
            "backbone": self.model.backbone,
            "decoders": self.model.decoders,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
        }


def new_training(args: argparse.Namespace, image_size: int, steps: int) -> Training:
    """From the seed; the same backbone, and for a width the same decoder, for every method."""
    cuts = architecture(args.arch, args.stages)
    torch.manual_seed(args.seed)
    backbone = cuts.make(image_size).to(args.device)
    freeze_above(backbone, cuts.stages[-1], image_size)
    model = wrapped(
        backbone,
        cuts,
        image_size,
        overlap=args.overlap,
        decoder=args.decoder,
        sharing=args.sharing,
        loss=args.loss,
        temperature=args.temperature,
        seed=args.seed,
    )
    if args.norm == "group":
        by_groups(model)
    if args.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.compile:
        for decoder in model.decoders:
            decoder.compile()
    model.to(memory_format=torch.channels_last)
    trained = optimizer(args.optimizer, model, args.lr, args.weight_decay)
    scheduler = warm_up_and_cosine(trained, round(args.warm_up * steps / args.epochs), steps)
    return Training(model, trained, scheduler, scaler_for(args.device, args.amp), Monitor(model, every=1))


def scaler_for(device: torch.device, amp: str) -> torch.amp.GradScaler:
    """Scales losses in fp16, and nothing else."""
    # a step that it skips, as fp16's first ones often are, is none of the optimiser's
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step\\(\\)` before", category=UserWarning)
    return torch.amp.GradScaler(device.type, enabled=amp == "fp16")


def freeze_above(backbone: nn.Module, top: str, image_size: int) -> None:
    """Nothing trains what comes after the last cut, such as a classifier, so weight decay should not shrink it either."""
    outlets: list[Tensor] = []
    weights = list(backbone.parameters())
    handle = backbone.get_submodule(top).register_forward_hook(lambda m, a, outlet: outlets.append(FEATURES(outlet)))
    backbone.eval()(weights[0].new_zeros(2, 3, image_size, image_size))
    backbone.train()
    handle.remove()
    reached = torch.autograd.grad(outlets[0].sum(), weights, allow_unused=True)
    for weight, gradient in zip(weights, reached, strict=True):
        weight.requires_grad_(gradient is not None)


def local_gradients(
    args: argparse.Namespace,
    training: Training,
    parallel: DistributedDataParallel | None,
    views: list[Tensor],
    labels: Tensor,
    last: bool,
) -> Tensor:
    """Add a micro-batch's share to the step's gradients; returns each unit's loss, accuracy and std, `(3, units)`.

    `parallel` is the model as several processes train it; they average the gradients after the step's `last` micro-batch.
    """
    model = training.model
    scale = training.scaler.scale(torch.ones((), device=args.device))  # 1, unless fp16 needs more
    targets = labels if args.loss in LABELLED else None
    autocast = torch.autocast(args.device.type, AMP[args.amp]) if args.amp in AMP else nullcontext()
    if parallel is None:
        with autocast:
            losses = model.local_step(*views, targets=targets, grad_scale=scale / args.accumulate)
    else:
        with nullcontext() if last else parallel.no_sync():
            with autocast:
                total = parallel(*views, targets=targets, grad_scale=scale)
            (total * (scale / args.accumulate)).backward()
        losses = model.losses
    assert training.monitor is not None
    seen = training.monitor.measured()
    return torch.stack([losses, seen["top1"], seen["spread"]])
