"""A run's directory: run.json says what was run, log.jsonl how it went; checkpoints; backbone.pt or .safetensors at the end."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from backbones import architecture
from command_line import read_lines, write
from inputs.images import DataError
from torch import Tensor, nn

from pretraining.norms import by_groups

KEPT = 2  # checkpoints: the newest, and the one before in case that it is damaged
FORMATS = {"pt": "backbone.pt", "safetensors": "backbone.safetensors"}
UNREADABLE = (
    OSError,
    RuntimeError,
    EOFError,
    KeyError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class Run:
    """A trained backbone in eval mode, and how it came about."""

    settings: dict[str, Any]
    backbone: nn.Module
    stages: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(path: Path) -> Run:
    """Build the backbone of a run from its directory, its backbone.pt (or .safetensors), or one of its checkpoints.

    An unfinished run gives the weights of its newest good checkpoint. Raises `DataError`, in one line.
    """
    path = Path(path)
    directory = path if path.is_dir() else path.parent
    settings = read_settings(directory)
    found = architecture(settings["arch"], settings.get("stages"))
    weights = _weights(path)
    backbone = found.make(settings["image_size"])
    if settings.get("norm") == "group":
        by_groups(backbone)
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as problem:
        raise DataError(f"{path} holds weights of another architecture than {settings['arch']}") from problem
    return Run(settings, backbone.eval(), found.stages, tuple(settings["mean"]), tuple(settings["std"]))


def _weights(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        finished = [path / name for name in FORMATS.values() if (path / name).is_file()]
        if not finished:
            checkpoint = newest_checkpoint(path)
            if checkpoint is None:
                raise DataError(f"{path} is of a run that has not come to its first checkpoint")
            return checkpoint["backbone"]
        path = finished[0]
    if path.suffix not in (".pt", ".safetensors"):
        raise DataError(
            f"{path} is no checkpoint: give the run's directory, its {' or '.join(FORMATS.values())}, or a checkpoint-*.pt"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        contents = read_checkpoint(path)
    except UNREADABLE as problem:
        raise DataError(f"{path} cannot be read: {reason(problem)}") from problem
    return contents.get("backbone", contents)


# ------------------------------------------------------------------------------------------------------------ settings


def read_settings(directory: Path) -> dict[str, Any]:
    """What run.json says."""
    path = directory / "run.json"
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise DataError(f"{directory} is no run of pretrain.py: there is no {path} that can be read") from problem
    if not isinstance(settings, dict) or not {"arch", "image_size", "mean", "std"} <= settings.keys():
        raise DataError(f"{directory} is no run of pretrain.py: {path} is another program's")
    return settings


def write_settings(directory: Path, settings: dict[str, Any]) -> None:
    text = json.dumps(settings, indent=1, default=str) + "\n"
    write(directory / "run.json", lambda path: path.write_text(text))


def commit() -> str | None:
    """Of this repository, with "-dirty" after it where files were changed; `None` where there is none."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def is_finished(directory: Path, settings: dict[str, Any], *, resume: bool, implied: Collection[str] = ()) -> bool:
    """Whether `directory` holds this run with its end; it is made where it is not there.

    Raises `DataError` for another run, or one that was not to be resumed. Settings that are `implied` by others are told where
    nothing else differs.
    """
    if not (directory / "run.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        return False
    before = read_settings(directory)
    if not resume:
        raise DataError(f"{directory} holds a run already: go on with it by --resume auto, or choose another --out")
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if changed := [name for name in changed if name not in implied] or changed:
        told = "; ".join(f"{name} {before.get(name)}, not {settings[name]}" for name in changed)
        raise DataError(f"{directory} holds a run with other settings: {told}; take those, or choose another --out")
    return "seconds" in before


# --------------------------------------------------------------------------------------------------------- checkpoints


def checkpoints(directory: Path) -> list[Path]:
    """The newest first."""
    return sorted(directory.glob("checkpoint-*.pt"), reverse=True)


def save_checkpoint(directory: Path, step: int, state: dict[str, Any]) -> None:
    """Write checkpoint-STEP.pt, whole or not at all; keep the newest two."""
    write(directory / f"checkpoint-{step:08d}.pt", lambda path: torch.save(state, path))
    for old in [*checkpoints(directory)[KEPT:], *directory.glob("checkpoint-*.unfinished")]:
        old.unlink()


def newest_checkpoint(directory: Path) -> dict[str, Any] | None:
    """The newest one that is whole, on the CPU; each damaged one is named on stderr.

    `None` where there never was one; where all are damaged, `DataError`.
    """
    for path in checkpoints(directory):
        try:
            return read_checkpoint(path)
        except UNREADABLE as problem:
            print(f"warning: {path} is damaged ({reason(problem)}); trying the one before it", file=sys.stderr)
    if checkpoints(directory):
        raise DataError(f"every checkpoint in {directory} is damaged; delete them to start anew")
    return None


def take_up(directory: Path, training: Any, steps: int) -> None:
    """Restore the newest good checkpoint, if there is one, of a run that ends at `steps`. Raises `DataError` for another's."""
    checkpoint = newest_checkpoint(directory)
    if checkpoint is None:
        return
    try:
        training.restore(checkpoint)
    except UNREADABLE as problem:
        raise DataError(f"the newest checkpoint of {directory} is not one of this run") from problem
    if training.step > steps:
        raise DataError(f"the newest checkpoint of {directory} is of step {training.step}; this run ends at {steps}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
        if (broken := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {broken} is wrong")
    contents = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(contents, dict):
        raise TypeError(f"it holds a {type(contents).__name__}")
    return contents


def reason(problem: BaseException) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0]


def save_backbone(directory: Path, backbone: nn.Module, kind: str) -> Path:
    """The plain weights, under the names that the backbone gives them."""
    path = directory / FORMATS[kind]
    weights = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
    if kind == "safetensors":
        from safetensors.torch import save_file

        write(path, lambda unfinished: save_file(weights, unfinished))
    else:
        write(path, lambda unfinished: torch.save(weights, unfinished))
    return path


# ----------------------------------------------------------------------------------------------------------------- log


def read_log(directory: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl; one that a killed run left unfinished is not there."""
    path = directory / "log.jsonl"
    lines = read_lines(path) if path.is_file() else []
    if any("step" not in line for line in lines):
        raise DataError(f"{path} is damaged: a line of it has no step")
    return lines


def cut_log(directory: Path, step: int) -> None:
    """Keep of log.jsonl what was written up to `step`: the rest will be written again."""
    kept = [json.dumps(line) + "\n" for line in read_log(directory) if line["step"] <= step]
    write(directory / "log.jsonl", lambda path: path.write_text("".join(kept)))
