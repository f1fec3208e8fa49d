"""A loop of one's own, monitored, then read out stage by stage: `python examples/trainers/plain_loop.py [STEPS]`."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from locallearn import LocalWrapper
from locallearn.diagnosis import Monitor, stage_quality


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,797 grey images of 8 by 8 pixels: four fifths to train on, the rest held out."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    held_out = torch.arange(len(images)) % 5 == 0
    classes = torch.from_numpy(labels)
    return TensorDataset(images[~held_out], classes[~held_out]), TensorDataset(images[held_out], classes[held_out])


def view(images: Tensor) -> Tensor:
    """Each image under a random affine map."""
    maps = torch.eye(2, 3) + 0.15 * torch.randn(len(images), 2, 3)
    return F.grid_sample(images, F.affine_grid(maps, list(images.shape), align_corners=False), align_corners=False)


def block(before: int, width: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


def main(steps: int = 300) -> Monitor:
    torch.manual_seed(0)
    train, test = digits()
    backbone = nn.Sequential(block(1, 32), block(32, 64, stride=2), block(64, 64), block(64, 64))
    model = LocalWrapper(backbone, stages=[0, 1, 2, 3], overlap=1, example=torch.zeros(2, 1, 8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = Monitor(model, every=50)
    batches = DataLoader(train, 128, sampler=RandomSampler(train, replacement=True, num_samples=128 * steps))
    for step, (images, _) in enumerate(batches):
        model.local_step(view(images), view(images))
        optimizer.step()
        optimizer.zero_grad()
        if monitor.due:
            print(step, {name: round(value, 3) for name, value in monitor.read().items()})
    monitor.close()
    print(stage_quality(model, DataLoader(train, 256), DataLoader(test, 256), augment=view))
    return monitor


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", metavar="STEPS", type=int, nargs="?", default=300)
    main(parser.parse_args().steps)
