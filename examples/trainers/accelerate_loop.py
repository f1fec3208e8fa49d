"""Hugging Face Accelerate: `accelerate launch examples/trainers/accelerate_loop.py [STEPS]`, or plain `python`.

`model(*views)` is what Accelerate wraps, for several processes and for mixed precision. fp16 needs the scale beforehand.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
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
    maps = (torch.eye(2, 3) + 0.15 * torch.randn(len(images), 2, 3)).to(images)
    return F.grid_sample(images, F.affine_grid(maps, list(images.shape), align_corners=False), align_corners=False)


def block(before: int, width: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


def main(steps: int = 300) -> Monitor:
    torch.manual_seed(0)
    accelerator, data = Accelerator(), digits()
    backbone = nn.Sequential(block(1, 32), block(32, 64, stride=2), block(64, 64), block(64, 64))
    local = LocalWrapper(backbone, stages=[0, 1, 2, 3], overlap=1, example=torch.zeros(2, 1, 8, 8))
    batches = DataLoader(data, 128, sampler=RandomSampler(data, replacement=True, num_samples=128 * steps))
    model, optimizer, batches = accelerator.prepare(local, torch.optim.AdamW(local.parameters(), lr=1e-3), batches)
    monitor = Monitor(local, every=50)
    for step, (images, _) in enumerate(batches):
        scale = accelerator.scaler.get_scale() if accelerator.scaler else None  # fp16 only
        loss = model(view(images), view(images), grad_scale=scale)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(local.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if monitor.due:
            accelerator.print(step, {name: round(value, 3) for name, value in monitor.read().items()})
    monitor.close()
    return monitor


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", metavar="STEPS", type=int, nargs="?", default=300)
    main(parser.parse_args().steps)
