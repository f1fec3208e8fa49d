"""Hugging Face `Trainer`: `python examples/trainers/hf_trainer.py [STEPS]`.

The trainer asks for a module that returns a loss, which is `model(*views)`; views are made where batches are collated.
"""

from __future__ import annotations

import argparse
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainingArguments

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


def two_views(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images = torch.stack([image for image, _ in rows])
    return {"view1": view(images), "view2": view(images)}


class ForTrainer(nn.Module):
    def __init__(self, model: LocalWrapper) -> None:
        super().__init__()
        self.model = model

    def forward(self, view1: Tensor, view2: Tensor) -> dict[str, Tensor]:
        return {"loss": self.model(view1, view2)}


class MonitoredTrainer(Trainer):
    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs | self.monitor.read(), *args, **kwargs)


def main(steps: int = 300) -> Trainer:
    widths = [(1, 32), (32, 64), (64, 64)]
    backbone = nn.Sequential(*[nn.Sequential(nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU()) for a, b in widths])
    model = LocalWrapper(backbone, stages=[0, 1, 2], overlap=1, example=torch.zeros(2, 1, 8, 8))
    with TemporaryDirectory() as folder:
        quiet = {"report_to": "none", "save_strategy": "no", "remove_unused_columns": False, "use_cpu": True}
        sizes = {"max_steps": steps, "per_device_train_batch_size": 128, "logging_steps": min(50, steps)}
        settings = TrainingArguments(folder, learning_rate=1e-3, seed=0, **sizes, **quiet)
        trainer = MonitoredTrainer(ForTrainer(model), settings, train_dataset=digits(), data_collator=two_views)
        trainer.monitor = Monitor(model, every=1)
        trainer.train()
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", metavar="STEPS", type=int, nargs="?", default=300)
    main(parser.parse_args().steps)
