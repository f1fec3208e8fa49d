"""Which images each step sees, and the seed of its views: both follow from the run's seed and the step's number alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

DROPOUT = 2048  # added to a part of a batch where its seed is not for views: there are fewer than 2048 parts
ORDER = 4098  # in a part's place: an epoch's permutation


def seed_of(seed: int, step: int, part: int) -> int:
    """A seed of its own for every part of every step of every run of fewer than a million steps."""
    return (seed * 1_000_003 + step) * 4_099 + part


@dataclass
class Draws(Sequence[tuple[int, Tensor]]):
    """`(seed of the views, indices of the images)` of one process's micro-batches, from the step `first` on.

    An epoch is a permutation of the images, cut into batches; what is left at its end is left out. A batch is shared evenly
    by the processes, and a process's share is cut into `accumulate` micro-batches.
    """

    images: int
    batch_size: int
    steps: int
    seed: int
    first: int = 0
    accumulate: int = 1
    process: int = 0
    processes: int = 1
    _epoch: int = field(default=-1, init=False)
    _order: Tensor = field(default_factory=lambda: torch.empty(0), init=False)

    def __len__(self) -> int:
        return (self.steps - self.first) * self.accumulate

    def __getitem__(self, number: int) -> tuple[int, Tensor]:
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} micro-batches; got {number}")
        step, micro_batch = divmod(number, self.accumulate)
        step += self.first
        epoch, batch = divmod(step, self.images // self.batch_size)
        part = self.process * self.accumulate + micro_batch
        size = self.batch_size // (self.processes * self.accumulate)
        begin = batch * self.batch_size + part * size
        return seed_of(self.seed, step, part), self._permutation(epoch)[begin : begin + size]

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, ORDER))
            self._epoch, self._order = epoch, torch.randperm(self.images, generator=generator)
        return self._order
