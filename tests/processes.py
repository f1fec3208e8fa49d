"""Runs a function in several gloo processes of one thread each, and gives back what each of them returned."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Every process is a fork of one that has imported these and done nothing else: a start takes no seconds.
multiprocessing.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.tensor.parallel", "torchvision"]
)


def run(work: Callable[..., Any], world: int, folder: Path, *args: Any) -> list[Any]:
    """What ``work(rank, *args)`` returned on each rank, in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what starting itself warns of
        mp.start_processes(_entry, (work, world, str(folder), args), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _entry(rank: int, work: Callable[..., Any], world: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    warnings.filterwarnings("ignore", message="local_step leaves this process's own")
    try:
        torch.save(work(rank, *args), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
