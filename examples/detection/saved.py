"""A detector that train.py has trained, built again from its run's directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from backbones import architecture
from detector import Size, mask_rcnn
from inputs.images import DataError
from pretraining.norms import by_groups
from pretraining.runs import UNREADABLE, newest_checkpoint, read_settings
from reading.encoders import Encoder
from torchvision.models.detection import MaskRCNN


def load_detector(directory: Path, device: torch.device) -> tuple[MaskRCNN, dict[str, Any]]:
    """The detector in eval mode, and its run's settings. An unfinished run gives its newest checkpoint's.

    Raises `DataError` in one line.
    """
    settings = read_settings(directory)
    if settings.get("task") != "detection":
        raise DataError(f"{directory} is no run of examples/detection/train.py")
    found = architecture(settings["arch"], settings.get("stages"))
    backbone = found.make(settings["image_size"])
    if settings["norm"] == "group":
        by_groups(backbone)
    statistics = {"mean": tuple(settings["mean"]), "std": tuple(settings["std"])}
    encoder = Encoder(
        name=settings["backbone"],
        arch=settings["arch"],
        backbone=backbone,
        stages=found.stages,
        image_size=settings["image_size"],
        **statistics,
        directory=directory,
        settings=settings,
    )
    size = Size(
        settings["width"], settings["hidden"], settings["rois"], tuple(settings["shorter"]), settings["longest"]
    )
    model = mask_rcnn(encoder, len(settings["classes"]), settings["mode"], size, device)
    try:
        path = directory / "detector.pt"
        if path.is_file():
            weights = torch.load(path, map_location="cpu", weights_only=True)
        elif (checkpoint := newest_checkpoint(directory)) is not None:
            weights = checkpoint["model"]
        else:
            raise DataError(f"{directory} is of a run that has not come to its first checkpoint")
        model.load_state_dict(weights)
    except UNREADABLE as problem:
        raise DataError(f"{directory} holds no weights of its detector that can be read") from problem
    return model.eval(), settings
