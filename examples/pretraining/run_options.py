"""The options of every script that trains: where it runs and how it goes on; none of them changes the weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from command_line import Parser, at_least, device, number_from

RESUMES = "stopped; --resume auto goes on from the last checkpoint, if there is one"


class Every(NamedTuple):
    """When a checkpoint is due: after so many steps, or so much time."""

    steps: int | None = None
    seconds: float | None = None

    def due(self, step: int, seconds: float) -> bool:
        """At a step, `seconds` after the last checkpoint."""
        return step % self.steps == 0 if self.steps else seconds >= self.seconds


def every(text: str) -> Every:
    """A type for arguments: 500 (steps) or 10min."""
    try:
        if text.endswith("min"):
            return Every(seconds=60 * number_from(0, above=True)(text.removesuffix("min")))
        return Every(steps=at_least(1)(text))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected steps such as 500 or minutes such as 10min, got {text!r}") from None


def add_run_arguments(parser: Parser, out: str, log_every: int) -> None:
    """`out` says where a run goes by default."""
    add = parser.add_argument
    add("--device", type=device, help="cpu, cuda, cuda:1, ... (cuda where there is one, one GPU per process)")
    add("--threads", type=at_least(1), metavar="N", help="of the CPU (torch's choice)")
    add("--out", type=Path, metavar="DIR", help=f"where the run goes ({out})")
    add("--resume", choices=["auto"], help="auto: go on after the newest good checkpoint in --out, if there is one")
    add(
        "--checkpoint-every",
        type=every,
        default=every("10min"),
        metavar="N",
        help="steps, or minutes as in 10min (10min)",
    )
    add("--log-every", type=at_least(1), default=log_every, metavar="STEPS", help="(%(default)s)")
    add("--tensorboard", action="store_true", help="write for it too, to --out/tensorboard")
