"""What is kept of a stream of vectors, whatever its length: a random sample in memory, or all of it on a disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from locallearn.diagnosis.measures import single


class Sample:
    """A uniform random sample of the images of a stream, by Vitter's algorithm R; the same one for every stage.

    Args:
        most: how many images are kept.
        seed: of a generator of its own.

    Attributes:
        seen: how many images there were.
    """

    def __init__(self, most: int, seed: int = 0) -> None:
        self.seen = 0
        self._most, self._kept = most, 0
        self._random = Random(seed)
        self._columns: list[Tensor] = []

    def add(self, columns: Sequence[Tensor]) -> None:
        """A batch: for each column (stages, labels), a row per image."""
        columns = [column.detach().cpu() for column in columns]
        if not self._columns:
            self._columns = [column.new_empty(self._most, *column.shape[1:]) for column in columns]
        slots: dict[int, int] = {}  # where a row goes, the last one where two would
        for row in range(len(columns[0])):
            slot = self._kept
            if self._kept < self._most:
                self._kept += 1
            else:
                slot = self._random.randrange(self.seen + 1)
            self.seen += 1
            if slot < self._most:
                slots[slot] = row
        if slots:
            to, of = torch.tensor([*slots]), torch.tensor([*slots.values()])
            for kept, column in zip(self._columns, columns, strict=True):
                kept[to] = column[of]

    def columns(self) -> list[Tensor]:
        """What is kept of each column."""
        return [column[: self._kept] for column in self._columns]


class OnDisk:
    """All rows of a stream, each column in a file of its own, read as if it were in memory.

    Args:
        folder: where the files go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._rows = folder, 0
        self._kinds: list[tuple[torch.dtype, torch.Size]] = []

    def add(self, columns: Sequence[Tensor]) -> None:
        """A batch: for each column, a row per image."""
        columns = [(single(column) if column.is_floating_point() else column).cpu() for column in columns]
        self._kinds = [(column.dtype, column.shape[1:]) for column in columns]
        for at, column in enumerate(columns):
            with self._file(at).open("ab") as file:
                column.contiguous().numpy().tofile(file)
        self._rows += len(columns[0])

    def columns(self) -> list[Tensor]:
        """Each column, mapped into memory: pages are read when they are looked at."""
        return [
            torch.from_file(str(self._file(at)), shared=False, size=self._rows * shape.numel(), dtype=dtype).view(
                self._rows, *shape
            )
            for at, (dtype, shape) in enumerate(self._kinds)
        ]

    def _file(self, at: int) -> Path:
        return self._folder / f"column-{at}"
