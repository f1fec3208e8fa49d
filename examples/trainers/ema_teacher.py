"""An EMA teacher, as in MoCo v3, for every unit by itself: `python examples/trainers/ema_teacher.py [STEPS]`.

The teacher is a second wrapped model whose weights follow by a moving average. Each unit's embeddings of one view are to find
the teacher's of the other view, at the same unit. The teacher's own loss only keeps what it is given.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from locallearn import LocalWrapper, info_nce
from locallearn.diagnosis import Monitor


def digits() -> TensorDataset:
    """1,797 grey images of 8 by 8 pixels, and their classes."""
    pixels, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels))


def view(images: Tensor) -> Tensor:
    maps = torch.eye(2, 3) + 0.15 * torch.randn(len(images), 2, 3)
    return F.grid_sample(images, F.affine_grid(maps, list(images.shape), align_corners=False), align_corners=False)


def main(steps: int = 300) -> Monitor:
    torch.manual_seed(0)
    data, taught = digits(), []

    def like_the_teacher(unit: int, z1: Tensor, z2: Tensor) -> Tensor:
        return info_nce(z1, taught[unit][1], form="one-way") + info_nce(z2, taught[unit][0], form="one-way")

    def teach(z1: Tensor, z2: Tensor) -> Tensor:
        taught.append((z1, z2))
        return z1.new_zeros(())

    cut = {"stages": [0, 1, 2], "overlap": 1, "example": torch.zeros(2, 1, 8, 8)}
    widths = [(1, 32), (32, 64), (64, 64)]
    backbone = nn.Sequential(*[nn.Sequential(nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU()) for a, b in widths])
    model = LocalWrapper(backbone, **cut, loss=[partial(like_the_teacher, unit) for unit in range(2)])
    teacher = LocalWrapper(deepcopy(backbone), **cut, decoder=deepcopy(model.decoders), loss=teach)
    optimizer, monitor = torch.optim.AdamW(model.parameters(), lr=1e-3), Monitor(model, every=50)
    batches = DataLoader(data, 128, sampler=RandomSampler(data, replacement=True, num_samples=128 * steps))
    for step, (images, _) in enumerate(batches):
        views = view(images), view(images)
        taught.clear()
        with torch.no_grad():
            teacher(*views)
        model.local_step(*views)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
        if monitor.due:
            print(step, {name: round(value, 3) for name, value in monitor.read().items()})
    monitor.close()
    return monitor


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", metavar="STEPS", type=int, nargs="?", default=300)
    main(parser.parse_args().steps)
