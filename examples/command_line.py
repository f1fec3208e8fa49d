"""What the examples' command lines share: how a script ends, checked arguments, files written whole or not at all."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import stoppable

import torch
from inputs.image_sets import DataError

from locallearn.diagnosis import DivergedError

# of the CPU's allocator, of CUDA's and of its libraries
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)
WANTED = re.compile(r"(?:tried|unable) to allocate (\d[\d.]* ?\w+)", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}\n")


def status_of(
    arguments: Parser,
    run: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None = None,
    stopped: str | Callable[[argparse.Namespace], str] = "stopped",
) -> int:
    """Run a script from its command line, and return its exit status.

    What can be foreseen to go wrong is one line on stderr and status 2, Ctrl-C is the line `stopped` and 130. All else is a
    mistake of the script's own, and its traceback is wanted.
    """
    args = arguments.parse_args(argv)
    try:
        stoppable.begin()
        return run(args) or 0
    except KeyboardInterrupt:
        print(f"\n{stopped if isinstance(stopped, str) else stopped(args)}", file=sys.stderr)
        return 130
    except Exception as problem:
        line = _foreseen(problem, args)
        if line is None:
            raise
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        arguments.error(line)
    print(f"rank {rank}: {line}", file=sys.stderr)  # torchrun's others may have a problem of their own
    return 2


def _foreseen(problem: Exception, args: argparse.Namespace) -> str | None:
    """What to say of a problem; `None` where nobody could foresee it."""
    text = " ".join(str(problem).split())
    if isinstance(problem, DataError | DivergedError):
        return text
    if isinstance(problem, ModuleNotFoundError):
        return f"this needs the package {problem.name}, which is not installed"
    if isinstance(problem, OSError):
        file = problem.filename or getattr(args, "out", None) or "a file"
        return f"cannot read or write {file}: {problem.strerror or problem}"
    if isinstance(problem, MemoryError) or (isinstance(problem, RuntimeError) and OUT_OF_MEMORY.search(text)):
        wanted = WANTED.search(text)
        advice = "lower --batch-size" if hasattr(args, "batch_size") else "take less at a time"
        return f"there is not enough memory{f' for {wanted[1]} more' if wanted else ''}: {advice}"
    if isinstance(problem, RuntimeError) and text.startswith("DataLoader worker"):
        return f"a process that reads images has died ({text}): take fewer --workers"
    return None


def at_least(least: int) -> Callable[[str], int]:
    """A type for arguments: whole numbers from `least` up."""

    def number(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} up, got {text!r}")
        return int(text)

    return number


def number_from(least: float, *, above: bool = False, most: float = math.inf) -> Callable[[str], float]:
    """A type for arguments: numbers from `least` up, or `above` it, and up to `most`."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least < value if above else least <= value) or not value <= most or math.isinf(value):
            end = "" if math.isinf(most) else f" up to {most:g}"
            raise argparse.ArgumentTypeError(
                f"expected a number {'above' if above else 'from'} {least:g}{end}, got {text!r}"
            )
        return value

    return number


def device(text: str) -> torch.device:
    """A type for arguments: a device that this machine has, and that computes (`meta` does not)."""
    try:
        one = torch.ones(1, device=text)
        one.item()
        return one.device
    except (RuntimeError, AssertionError, ImportError) as problem:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine") from problem


def read_json(path: Path) -> Any:
    """What a file says. Raises `DataError` where it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as problem:
        raise DataError(f"{path} is damaged: it is no JSON ({problem})") from problem


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What a file says line by line, without a last line that is not finished. Raises `DataError` where it is damaged."""
    try:
        lines = [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    except ValueError as problem:
        raise DataError(f"{path} is damaged: a line of it is no JSON ({problem})") from problem
    if other := [line for line in lines if not isinstance(line, dict)]:
        raise DataError(f"{path} is damaged: a line of it says {other[0]!r:.60}")
    return lines


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Write all of a file or nothing: a run that is killed meanwhile leaves the old one."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        writer(unfinished)
        unfinished.replace(path)
    except RuntimeError as problem:  # torch.save's word for a full disk
        raise OSError(errno.EIO, f"the disk may be full ({' '.join(str(problem).split())})", str(path)) from problem
    finally:
        unfinished.unlink(missing_ok=True)
