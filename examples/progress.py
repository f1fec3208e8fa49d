"""What is seen of a run while it trains: a bar, log.jsonl, and TensorBoard where it is asked for."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from images import DataError
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None


def peak_bytes(device: torch.device) -> int:
    """The most memory that was held at once: on a GPU by tensors, on a CPU by the whole process (0 if it cannot be known)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def summary_writer() -> Callable[..., Any]:
    """TensorBoard's. Raises `DataError` where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as missing:
        raise DataError("--tensorboard needs the package tensorboard: pip install tensorboard") from missing
    return SummaryWriter


class Progress:
    """Counts every step on a bar, which shows the time left too, and records some of them.

    Args:
        directory: of the run.
        total: steps of the whole run.
        first: steps done before.
        seconds: what those took.
        batch_size: images a step.
        device: whose memory is told.
        tensorboard: whether to write for it, too.
        leads: whether this process is the one that shows and writes; for the others all this does nothing.
    """

    def __init__(
        self,
        directory: Path,
        total: int,
        first: int,
        seconds: float,
        batch_size: int,
        device: torch.device,
        tensorboard: bool,
        leads: bool = True,
    ) -> None:
        self._leads = leads
        self._writer: Any = None
        if tensorboard and leads:
            self._writer = summary_writer()(str(directory / "tensorboard"), purge_step=first)
        self._log = directory / "log.jsonl"
        self._bar = tqdm(total=total, initial=first, unit="step", dynamic_ncols=True, disable=not leads)
        self._batch_size, self._device = batch_size, device
        self._begin = time.perf_counter() - seconds
        self._last = first, seconds  # step and seconds of the last line

    @property
    def seconds(self) -> float:
        """What all steps took together."""
        return time.perf_counter() - self._begin

    def step(self) -> None:
        self._bar.update()

    def record(self, line: dict[str, Any]) -> None:
        """Write a line of the log: `line`, which has a step and the units' losses, speed, memory and time."""
        if not self._leads:
            return
        step, seconds = line["step"], self.seconds
        speed = (step - self._last[0]) * self._batch_size / (seconds - self._last[1])
        self._last = step, seconds
        memory = peak_bytes(self._device)
        line = {**line, "images_per_second": speed, "peak_bytes": memory, "seconds": seconds}
        with self._log.open("a") as log:
            log.write(json.dumps(line) + "\n")
        losses = " ".join(f"{loss:.2f}" for loss in line["losses"])
        self._bar.set_postfix_str(f"losses {losses}, {speed:,.0f} images/s, {memory / 1e9:.2f} GB", refresh=False)
        if self._writer is not None:
            for name, value in line.items():
                for unit, number in enumerate(value) if isinstance(value, list) else [(None, value)]:
                    self._writer.add_scalar(name if unit is None else f"{name}/unit {unit}", number, step)

    def warn(self, text: str) -> None:
        if self._leads:
            self._bar.write(f"warning: {text}", file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *problem: object) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()
