"""Lightning, with a callback that looks at every unit and stage: `python examples/trainers/lightning_module.py [STEPS]`."""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from locallearn import LocalWrapper
from locallearn.diagnosis import Monitor, stage_quality


def digits() -> TensorDataset:
    pixels, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels))


def view(images: Tensor) -> Tensor:
    maps = (torch.eye(2, 3) + 0.15 * torch.randn(len(images), 2, 3)).to(images)
    return F.grid_sample(images, F.affine_grid(maps, list(images.shape), align_corners=False), align_corners=False)


class Local(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        widths = [(1, 32), (32, 64), (64, 64)]
        backbone = nn.Sequential(*[nn.Sequential(nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU()) for a, b in widths])
        self.model = LocalWrapper(backbone, stages=[0, 1, 2], overlap=1, example=torch.zeros(2, 1, 8, 8))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self.model(view(batch[0]), view(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Diagnosis(lightning.Callback):
    def __init__(self, train: DataLoader[Any], test: DataLoader[Any]) -> None:
        self.train, self.test = train, test

    def on_fit_start(self, trainer: lightning.Trainer, module: Local) -> None:
        self.monitor = Monitor(module.model, every=10)

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Local, *_: Any) -> None:
        module.log_dict(self.monitor.read() if self.monitor.due else {})

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Local) -> None:
        quality = stage_quality(module.model, self.train, self.test, linear_probe=False)
        module.log_dict({f"knn/stage_{k}": stage.knn for k, stage in enumerate(quality.stages)})


def main(steps: int = 100) -> lightning.Trainer:
    lightning.seed_everything(0)
    train, test = random_split(digits(), [0.8, 0.2])
    look = Diagnosis(DataLoader(train, 256), DataLoader(test, 256))
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"], False)
    trainer = lightning.Trainer(max_steps=steps, callbacks=[look], gradient_clip_val=1.0, accelerator="cpu", **quiet)
    trainer.fit(Local(), DataLoader(train, 128, shuffle=True, drop_last=True))
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", metavar="STEPS", type=int, nargs="?", default=100)
    main(parser.parse_args().steps)
