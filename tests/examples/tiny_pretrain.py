"""examples/pretrain.py with one more architecture, small enough for tests; as a module, and as a script for other processes.

`--plain` in front of the arguments: no randomness in views, no dropout, float64.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import backbones
import pretrain


class Tiny(nn.Module):
    """Three stages of two or three blocks, dropout, and a classifier that is never trained."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(self.block(3, 8), self.block(8, 8))
        self.middle = nn.Sequential(self.block(8, 12), nn.Dropout(0.2), self.block(12, 12))
        self.top = nn.Sequential(self.block(12, 16), self.block(16, 16), self.block(16, 16))
        self.fc = nn.Linear(16, 5)

    def block(self, before: int, after: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.top(self.middle(self.low(x))).mean((2, 3)))


TINY = backbones.Architecture(lambda image_size: Tiny(), ("low", "middle", "top"))


def plain_view(images: Tensor) -> Tensor:
    return images.double() / 127.5 - 1


if __name__ == "__main__":
    backbones.ARCHITECTURES["tiny"] = TINY
    if sys.argv[1] == "--plain":
        del sys.argv[1]
        nn.Dropout.forward = lambda self, x: x
        torch.set_default_dtype(torch.float64)
        pretrain.views_of = lambda images: plain_view
    torch.set_num_threads(1)
    sys.exit(pretrain.main())
