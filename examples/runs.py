"""A run's directory: run.json says what was run; backbone.pt holds what came out of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from backbones import ARCHITECTURES
from images import DataError
from torch import nn


@dataclass(frozen=True)
class Run:
    """A trained backbone in eval mode, and how it came about."""

    settings: dict[str, Any]
    backbone: nn.Module
    stages: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(path: Path) -> Run:
    """Build the backbone of a run from its directory or its backbone.pt. Raises `DataError`, in one line."""
    directory = path if path.is_dir() else path.parent
    try:
        settings = json.loads((directory / "run.json").read_text())
        architecture = ARCHITECTURES[settings["arch"]]
    except (OSError, ValueError, KeyError) as problem:
        raise DataError(f"{directory} is no run of pretrain.py: it has no run.json, or not one of its own") from problem
    weights = path / "backbone.pt" if path.is_dir() else path
    backbone = architecture.make(settings["image_size"])
    try:
        backbone.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except OSError as problem:
        raise DataError(f"{weights} cannot be read: {problem.strerror}") from problem
    except RuntimeError as problem:
        raise DataError(f"{weights} holds weights of another architecture than {settings['arch']}") from problem
    return Run(settings, backbone.eval(), architecture.stages, tuple(settings["mean"]), tuple(settings["std"]))


def read_log(directory: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl; one that a killed run left unfinished is not there."""
    path = directory / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
