"""Ways to train one chain of blocks on two processes, each as a step that both of them call; and on one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

from locallearn import InfoNCE, LocalWrapper, MLPDecoder, info_nce
from locallearn.pipeline import Pipeline

STAGES = 4
PARTS = (4, 8)  # micro-batches


class Setting(NamedTuple):
    """Attributes: `rows` are of both views together; `blocks` are of the whole chain, as many in each stage."""

    rows: int = 64
    width: int = 64
    pixels: int = 16
    blocks: int = 8


@dataclass
class Way:
    """How to train.

    Attributes:
        name: in the table.
        method: what it is compared with on one process: "LoCo", "Greedy InfoMax" or "end to end".
        step: one batch, on this rank; `None` where this rank has nothing to do.
        share: of the round's steps that each rank does.
        flush: after the steps of a round.
        sent: bytes that this rank has sent so far, or in a step where `sent_each_step`.
    """

    name: str
    method: str
    step: Callable[[], object] | None
    share: float = 1.0
    flush: Callable[[], object] = field(default=lambda: None)
    sent: Callable[[], int] = field(default=lambda: 0)
    sent_each_step: int = 0


class Block(nn.Module):
    """Two convolutions around a shortcut; the channels and pixels stay."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2)]
        self.main = nn.Sequential(
            convolutions[0], nn.BatchNorm2d(width), nn.ReLU(), convolutions[1], nn.BatchNorm2d(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.main(x)).relu()


def stages(setting: Setting) -> nn.Sequential:
    """The chain, alike on every rank."""
    torch.manual_seed(0)
    each = setting.blocks // STAGES
    return nn.Sequential(*(nn.Sequential(*(Block(setting.width) for _ in range(each))) for _ in range(STAGES)))


def sgd(weights: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, lr=1e-3, momentum=0.9)


def wrapped(setting: Setting, overlap: int) -> LocalWrapper:
    example = torch.zeros(2, setting.width, setting.pixels, setting.pixels)
    loss = InfoNCE(gather=False)
    return LocalWrapper(stages(setting), range(STAGES), overlap, MLPDecoder, loss=loss, example=example)


def ways(setting: Setting, rank: int) -> list[Way]:
    """All of them; each rank makes all, in the same order."""
    shape = (setting.rows // 2, setting.width, setting.pixels, setting.pixels)
    views = torch.rand(2, *shape).unbind()
    half = [view[: len(view) // 2] for view in views]
    found: list[Way] = []
    overlaps = {"LoCo": 1, "Greedy InfoMax": 0, "end to end": STAGES - 1}

    def alone(overlap: int) -> Callable[[], None]:
        model = wrapped(setting, overlap)
        return partial(_single, model, sgd(model.parameters()), views)

    for method, overlap in overlaps.items():
        step = alone(overlap)
        found.append(Way(f"{method}, one process", method, step if rank == 0 else None))
        if method == "LoCo":
            found.append(Way("ceiling: each process by itself, half of the steps", method, step, share=0.5))
    for name, overlap, mode in (
        ("LoCo, exact", 1, "exact"),
        ("LoCo, eager", 1, "eager"),
        ("Greedy InfoMax", 0, "exact"),
    ):
        example = torch.zeros(2, *shape[1:])
        pipe = Pipeline(wrapped(setting, overlap), [2, 2], sgd, mode=mode, example=example)
        step = partial(pipe.step, *(views if rank == 0 else ()))
        method = "LoCo" if overlap else "Greedy InfoMax"
        found.append(
            Way(f"{name}, pipeline [2, 2]", method, step, flush=pipe.flush, sent=lambda pipe=pipe: pipe.bytes_sent)
        )
    for kind in (ScheduleGPipe, Schedule1F1B):
        for parts in PARTS:
            found.append(_classical(kind, parts, setting, rank, views))
    for name, overlap in (("LoCo", 1), ("end to end", STAGES - 1)):
        found.append(_data_parallel(name, wrapped(setting, overlap), half))
    model = wrapped(setting, 1)
    step = partial(_single, model, sgd(model.parameters()), half, group=dist.group.WORLD)
    found.append(Way("LoCo, data parallel, `local_step(group=)`", "LoCo", step, sent_each_step=_reduced(model)))
    return found


def _single(model: LocalWrapper, optimizer: torch.optim.Optimizer, views: list[Tensor], **options: Any) -> None:
    model.local_step(*views, **options)
    optimizer.step()
    optimizer.zero_grad()


def _reduced(model: nn.Module) -> int:
    """Bytes that each of two ranks sends to average all gradients."""
    return sum(weight.nbytes for weight in model.parameters())


def _data_parallel(method: str, model: LocalWrapper, views: list[Tensor]) -> Way:
    ddp, optimizer = DistributedDataParallel(model), sgd(model.parameters())

    def step() -> None:
        ddp(*views).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Way(f"{method}, DistributedDataParallel", method, step, sent_each_step=_reduced(model))


def _classical(kind: Any, parts: int, setting: Setting, rank: int, views: tuple[Tensor, ...]) -> Way:
    """Torch's pipelines, end to end; a micro-batch holds pairs, and its loss has no other negatives."""
    chain = stages(setting)
    part: nn.Module = chain[:2] if rank == 0 else nn.Sequential(*chain[2:], MLPDecoder(setting.width))
    optimizer = sgd(part.parameters())
    pairs = torch.stack(views, 1).flatten(0, 1)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return info_nce(output[0::2], output[1::2], gather=False)

    schedule = kind(PipelineStage(part, rank, 2, torch.device("cpu")), parts, loss_fn=loss)

    def step() -> None:
        schedule.step(pairs) if rank == 0 else schedule.step(target=pairs[:, 0, 0, 0])
        optimizer.step()
        optimizer.zero_grad()

    name = {"ScheduleGPipe": "GPipe", "Schedule1F1B": "1F1B"}[kind.__name__]
    return Way(f"end to end, {name}, {parts} micro-batches", "end to end", step, sent_each_step=pairs.nbytes)
