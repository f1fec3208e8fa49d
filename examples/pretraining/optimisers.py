"""SimCLR's recipe of optimisation: LARS, SGD (with Nesterov's momentum) or AdamW, linear warm-up, cosine decay."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn, optim
from torch.optim import lr_scheduler


class Recipe(NamedTuple):
    """What an optimiser is given where nothing else is said: the learning rate per 256 images, and weight decay."""

    lr: float
    weight_decay: float


RECIPES = {
    "lars": Recipe(0.3, 1e-6),  # SimCLR's, and the paper's
    "sgd": Recipe(0.06, 1e-6),
    "nesterov": Recipe(0.2, 1e-4),  # InfoPro's, for labels
    "adamw": Recipe(2e-3, 1e-2),
}
MOMENTUM = 0.9


def optimizer(name: str, model: nn.Module, lr: float, weight_decay: float) -> optim.Optimizer:
    """Trains all that requires a gradient; biases and normalisation layers without decay, and without LARS's trust ratio."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    matrices = [weight for weight in trained if weight.ndim > 1]
    vectors = [weight for weight in trained if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if name == "lars":
        from timm.optim import Lars  # takes seconds to import

        # timm adapts a group if it decays, or always; said for both, so that weights adapt without decay too
        adapts = [group | {"always_adapt": always} for group, always in zip(groups, (True, False), strict=True)]
        return Lars(adapts, lr=lr, momentum=MOMENTUM)
    if name in ("sgd", "nesterov"):
        return optim.SGD(groups, lr=lr, momentum=MOMENTUM, nesterov=name == "nesterov")
    return optim.AdamW(groups, lr=lr)


def warm_up_and_cosine(optimizer: optim.Optimizer, warm_up: int, steps: int) -> lr_scheduler.LRScheduler:
    """From 1 / (warm_up + 1) of the learning rate up in `warm_up` steps, then down to 0 at the last of `steps`."""
    down = lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm_up))
    if not warm_up:
        return down
    up = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warm_up + 1), total_iters=warm_up)
    return lr_scheduler.SequentialLR(optimizer, [up, down], milestones=[warm_up])
