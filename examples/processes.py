"""Which of several processes this is, as torchrun tells them, and what they have to agree on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from images import DataError
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process's number, how many there are, and its number on this machine."""

    rank: int
    size: int
    local: int

    @classmethod
    def of_torchrun(cls) -> Processes:
        """Read from the environment; one process where torchrun did not start it."""
        rank, size, local = (int(os.environ.get(name, alone)) for name, alone in _TORCHRUN)
        return cls(rank, size, local)

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def device(self, wanted: torch.device | None) -> torch.device:
        """`wanted`, or a GPU for each process where there are any, or the CPU."""
        if wanted is not None and (wanted.type != "cuda" or self.size == 1):
            return wanted
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if self.local >= torch.cuda.device_count():
            raise DataError(
                f"process {self.local} of this machine finds {torch.cuda.device_count()} GPUs: start as many processes, or "
                "use --device cpu"
            )
        return torch.device("cuda", self.local)

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """While open, the processes can talk to each other: over nccl between GPUs, else over gloo."""
        if self.size == 1:
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            yield
        finally:
            dist.destroy_process_group()

    def mean(self, numbers: Tensor) -> Tensor:
        """The mean over all processes."""
        if self.size > 1:
            numbers = numbers / self.size
            dist.all_reduce(numbers)
        return numbers


_TORCHRUN = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
