"""What the examples' command lines share: errors in one line, checked arguments, files written whole or not at all."""

from __future__ import annotations

import argparse
import errno
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}\n")


def at_least(least: int) -> Callable[[str], int]:
    """A type for arguments: whole numbers from `least` up."""

    def number(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} up, got {text!r}")
        return int(text)

    return number


def number_from(least: float, *, above: bool = False) -> Callable[[str], float]:
    """A type for arguments: numbers from `least` up, or `above` it."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least < value < math.inf if above else least <= value < math.inf):
            raise argparse.ArgumentTypeError(
                f"expected a number {'above' if above else 'from'} {least:g}, got {text!r}"
            )
        return value

    return number


def device(text: str) -> torch.device:
    """A type for arguments: a device that this machine has."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as problem:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine") from problem


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Write all of a file or nothing: a run that is killed meanwhile leaves the old one."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        writer(unfinished)
        unfinished.replace(path)
    except RuntimeError as problem:  # torch.save's word for a full disk
        raise OSError(errno.EIO, " ".join(str(problem).split()), str(path)) from problem
    finally:
        unfinished.unlink(missing_ok=True)
