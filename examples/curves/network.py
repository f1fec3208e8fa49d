"""What overlap_curve.py trains: a backbone under a row's plan, and all that is the same in every row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from inputs.image_sets import DataError, Images
from pretraining.methods import DECODERS, scope, seeded
from pretraining.optimisers import optimizer, warm_up_and_cosine
from pretraining.training import Training
from torch import Tensor, nn

from curves.presets import SHARINGS, Job, Setting, plan_of
from locallearn import InfoNCE, LocalWrapper, Plan


class CrossEntropy(nn.Module):
    """A unit's loss by labels; keeps how many of the last batch it had right."""

    right = 0

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.right = int((logits.argmax(dim=1) == labels).sum()) if not self.training else 0
        return F.cross_entropy(logits, labels)


def wrapped(
    setting: Setting,
    row: str,
    backbone: nn.Module,
    image_size: int,
    classes: int,
    seed: int = 0,
    recompute: bool = False,
) -> LocalWrapper:
    """The backbone with a row's plan; a decoder of the same kind, and for a width with the same weights, in every row."""
    make, weight = DECODERS[setting.decoder], next(backbone.parameters())
    supervised = setting.task == "supervised"
    stages, soft = setting.names, None
    if row in SHARINGS:
        stages, plan, soft = scope(backbone, stages, overlap=1, sharing=SHARINGS[row])
    else:
        plan = plan_of(row, setting.stages)
    return LocalWrapper(
        backbone,
        stages,
        decoder=alike(partial(make, out_features=classes) if supervised else make, seed, plan),
        loss=[CrossEntropy() for _ in plan.units] if supervised else InfoNCE(setting.temperature, form="nt-xent"),
        **({"plan": plan} if soft is None else {"sharing": soft, "overlap": 1}),
        checkpoint=recompute,
        example=weight.new_zeros(2, 3, image_size, image_size),
    )


def alike(make: Callable[[int], nn.Module], seed: int, plan: Plan) -> Callable[[int], nn.Module]:
    """Makes a plan's decoders, one call per unit: for a width all have the same weights, whatever the plan.

    But where two units read one stage, the second has others: with the same ones both would learn the same thing.
    """
    ends = [unit.last for unit in plan.units]
    before = iter([ends[:k].count(end) for k, end in enumerate(ends)])

    def decoder(width: int) -> nn.Module:
        return seeded(make, seed + 1_000_003 * next(before))(width)

    return decoder


def new_training(job: Job, images: Images, steps: int, on: torch.device) -> Training:
    torch.manual_seed(job.seed)
    backbone = job.setting.backbone(images.size).to(on)
    model = wrapped(job.setting, job.row, backbone, images.size, images.classes, job.seed)
    model.to(memory_format=torch.channels_last)
    trained = optimizer(job.setting.optimizer, model, job.setting.lr, job.setting.weight_decay)
    scheduler = warm_up_and_cosine(trained, round(job.setting.warm_up * steps), steps)
    return Training(model, trained, scheduler, torch.amp.GradScaler(on.type, enabled=False))


def first(images: Images, setting: Setting) -> Images:
    """As many as the setting takes, from the beginning of both parts."""
    train, test = slice(setting.images), slice(setting.held_out)
    part = images.train[train], images.train_labels[train], images.test[test], images.test_labels[test]
    if len(part[0]) < setting.batch_size:
        raise DataError(
            f"{images.name} has {len(part[0])} images to train on: too few for a batch of {setting.batch_size}"
        )
    return Images(images.name, *part)
