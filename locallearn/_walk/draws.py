"""Random numbers that follow from a seed and a place, so that a stage draws the same wherever it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import TypeAlias

import torch
from torch import nn

Draw: TypeAlias = Callable[[str, int], None]  # ("stage", 3) or ("unit", 2): who draws from here on


@contextmanager
def draws(seed: int | None, model: nn.Module) -> Iterator[Draw]:
    """Yields what begins a place's own random numbers; with ``None`` it does nothing, and nobody's stream changes.

    Afterwards the random state is as it was.

    Example:
        >>> with draws(7, nn.Identity()) as draw:
        ...     draw("stage", 1)
        ...     once = torch.rand(2)
        ...     draw("stage", 1)
        ...     bool((once == torch.rand(2)).all())
        True
    """
    if seed is None:
        yield lambda kind, index: None
        return

    def draw(kind: str, index: int) -> None:
        digest = blake2b(f"{seed} {kind} {index}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little"))

    gpus = sorted({weight.device.index for weight in model.parameters() if weight.is_cuda})
    with torch.random.fork_rng(gpus):
        yield draw
