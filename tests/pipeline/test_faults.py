"""A rank is killed, or stalls: all others end with one error in time, and a new start goes on as if nothing had been."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import processes  # noqa: F401 - says what a new process finds imported
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from locallearn import LocalWrapper
from locallearn.pipeline import Pipeline, PipelineError

RANKS = [2, 2, 2]
STEPS = 8
TIMEOUT = 4.0


class Fault(NamedTuple):
    """Where a rank strikes itself.

    Attributes:
        rank: which one.
        step: in which step, counted from the first of all.
        evaluated: after how many of its losses in that step.
        stalls: whether it stops, instead of being killed.
    """

    rank: int
    step: int
    evaluated: int
    stalls: bool


class Struck(nn.Module):
    """The loss of all units, after which a rank may be gone."""

    def __init__(self) -> None:
        super().__init__()
        self.left: int | None = None
        self.how = signal.SIGKILL

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), self.how)
        return nn.functional.cross_entropy(a @ b.T, torch.arange(len(a)))


def build() -> LocalWrapper:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.1)) for _ in range(6)))
    decoder = lambda width: nn.Linear(width, 8)  # noqa: E731
    return LocalWrapper(net, list(range(6)), decoder=decoder, example=torch.rand(2, 4), loss=Struck())


def views(step: int) -> tuple[Tensor, ...]:
    return torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(step)).unbind()


def adamw(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=0.01)


def work(rank: int, attempt: int, folder: str, fault: Fault | None) -> None:
    """Goes on from the last checkpoint, one of which is written after every step; leaves behind how it ended."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    store = f"file://{folder}/store{attempt}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=len(RANKS))
    model = build()
    pipe = Pipeline(model, RANKS, adamw, example=torch.rand(2, 4), timeout=timedelta(seconds=TIMEOUT))
    latest = Path(folder, "latest")
    done = int(latest.read_text()) if latest.exists() else 0
    if done:
        state = pipe.state_dict()
        dcp.load(state, checkpoint_id=f"{folder}/{done}")
        pipe.load_state_dict(state)
    ended = "finished"
    try:
        for step in range(done, STEPS):
            if fault is not None and (rank, step) == (fault.rank, fault.step):
                model.loss.left = fault.evaluated
                model.loss.how = signal.SIGSTOP if fault.stalls else signal.SIGKILL
            pipe.step(*views(step), seed=step)
            pipe.flush()
            dcp.save(pipe.state_dict(), checkpoint_id=f"{folder}/{step + 1}")
            if rank == 0:
                Path(folder, "new").write_text(str(step + 1))
                Path(folder, "new").replace(latest)
    except PipelineError as error:
        ended = str(error)
    Path(folder, f"{attempt}-{rank}").write_text(ended)
    os._exit(0)


def attempt(number: int, folder: Path, fault: Fault | None) -> tuple[dict[int, str], float]:
    """How each rank that is left has ended, and how many seconds that took, from the start."""
    context = multiprocessing.get_context("forkserver")
    ranks = range(len(RANKS))
    started = time.monotonic()
    running = [context.Process(target=work, args=(rank, number, str(folder), fault)) for rank in ranks]
    for process in running:
        process.start()
    left = [rank for rank in ranks if fault is None or rank != fault.rank]
    for rank in left:
        running[rank].join(60)
    took = time.monotonic() - started
    for process in running:
        process.kill()
        process.join()
    told = {rank: folder / f"{number}-{rank}" for rank in left}
    return {rank: path.read_text() if path.exists() else "" for rank, path in told.items()}, took


def unbroken() -> dict[str, Tensor]:
    model = build()
    optimizer = adamw([*model.parameters()])
    for step in range(STEPS):
        model.local_step(*views(step), seed=step)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def check(faults: list[Fault], folder: Path) -> None:
    """Each attempt ends by a fault, the last one with all steps done and the weights of an unbroken run."""
    latest = folder / "latest"
    for number, fault in enumerate(faults):
        done = int(latest.read_text()) if latest.exists() else 0
        ended, took = attempt(number, folder, fault)
        assert took < TIMEOUT + 30, "most of it is the start, on a busy machine"
        for rank, error in ended.items():
            assert error.endswith("Start all ranks again from the last checkpoint"), (fault, ended)
            assert f"rank {rank} (stages {2 * rank} to {2 * rank + 1}) waited for" in error, (fault, ended)
            assert f"in step {fault.step - done} since the start" in error, (fault, ended)
            assert error.startswith(f"rank {fault.rank} (stages"), (fault, ended)
    ended, _ = attempt(len(faults), folder, None)
    assert set(ended.values()) == {"finished"}
    whole = build()
    state = {"model": whole.state_dict()}
    dcp.load(state, checkpoint_id=folder / str(STEPS))
    wanted = unbroken()
    assert all(torch.equal(state["model"][name], tensor) for name, tensor in wanted.items())


def drawn(kills: int, stalls: int) -> list[Fault]:
    """Faults in random order, in any rank, step and place, of a run that does not end before the last of them."""
    kinds = [False] * kills + [True] * stalls
    random.shuffle(kinds)
    steps = sorted(random.randrange(STEPS) for _ in kinds)
    units = (1, 2, 2)
    ranks = [random.randrange(len(RANKS)) for _ in kinds]
    return [
        Fault(rank, step, random.randrange(units[rank]), stalls)
        for rank, step, stalls in zip(ranks, steps, kinds, strict=True)
    ]


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_killed_and_a_stalled_rank_end_all_others_and_the_next_start_goes_on(tmp_path: Path) -> None:
    check([Fault(2, 2, 0, stalls=False), Fault(1, 5, 1, stalls=True)], tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_any_rank_may_be_lost_at_any_step(tmp_path: Path, full: bool) -> None:
    if not full:
        pytest.skip("26 starts; run with --full")
    random.seed(0)
    check(drawn(kills=20, stalls=5), tmp_path)
