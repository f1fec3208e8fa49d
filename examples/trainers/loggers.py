"""Any logger takes `monitor.read()`: TensorBoard, W&B and what is like it: `python examples/trainers/loggers.py [STEPS]`."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from locallearn import LocalWrapper
from locallearn.diagnosis import Monitor


def digits() -> TensorDataset:
    """1,797 grey images of 8 by 8 pixels, and their classes."""
    pixels, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels))


def view(images: Tensor) -> Tensor:
    """Each image under a random affine map."""
    maps = torch.eye(2, 3) + 0.15 * torch.randn(len(images), 2, 3)
    return F.grid_sample(images, F.affine_grid(maps, list(images.shape), align_corners=False), align_corners=False)


class TensorBoard:
    """TensorBoard behind W&B's `log`."""

    def __init__(self, folder: str) -> None:
        from torch.utils.tensorboard import SummaryWriter  # needs: pip install tensorboard

        self.writer = SummaryWriter(folder)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()


def main(steps: int = 300, run: Any = None) -> Monitor:
    """`run` is anything with `log(values, step=)`, such as `wandb.init(project="locallearn")`."""
    torch.manual_seed(0)
    run = run or TensorBoard("runs/loggers")
    widths, data = [(1, 32), (32, 64), (64, 64)], digits()
    backbone = nn.Sequential(*[nn.Sequential(nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU()) for a, b in widths])
    model = LocalWrapper(backbone, stages=[0, 1, 2], overlap=1, example=torch.zeros(2, 1, 8, 8))
    optimizer, monitor = torch.optim.AdamW(model.parameters(), lr=1e-3), Monitor(model, every=10)
    batches = DataLoader(data, 128, sampler=RandomSampler(data, replacement=True, num_samples=128 * steps))
    for step, (images, _) in enumerate(batches):
        model.local_step(view(images), view(images))
        optimizer.step()
        optimizer.zero_grad()
        if monitor.due:
            run.log(monitor.read(), step=step)
    monitor.close()
    return monitor


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", metavar="STEPS", type=int, nargs="?", default=300)
    main(parser.parse_args().steps)
