"""Two gloo processes: under DistributedDataParallel the gradients are the mean of the single processes'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from oracle import assert_same, gradients
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from zoo import conv, small_net

from locallearn import InfoNCE, LocalWrapper, MLPDecoder
from locallearn.distributed import average_gradients, world_size

WORLD = 2


class WithTail(nn.Module):
    """A backbone with a classifier that local training leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), conv(4, 4), conv(4, 4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.c(self.b(self.a(x))).mean((2, 3)))
        return result


def build() -> LocalWrapper:
    torch.manual_seed(0)
    local = [LocalNegatives(), LocalNegatives()]  # each process's own negatives, so that the mean is easy to say
    return LocalWrapper(WithTail(), ["a", "b", "c"], decoder=MLPDecoder, example=torch.rand(2, 3, 8, 8), loss=local)


class LocalNegatives(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        similarity = a @ b.T
        return nn.functional.cross_entropy(similarity, torch.arange(len(a)))


def views(rank: int, step: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(2, 4, 3, 8, 8, generator=generator).unbind()


def mean_gradients(step: int) -> dict[str, Tensor]:
    each = []
    for rank in range(WORLD):
        model = build()
        model.local_step(*views(rank, step))
        each.append(gradients(model))
    return {name: torch.stack([g[name] for g in each]).mean(0) for name in each[0]}


def work(rank: int, expected: list[dict[str, Tensor]]) -> None:
    assert world_size() == WORLD

    options: list[dict[str, Any]] = [{}, {"static_graph": True}, {"find_unused_parameters": True}]
    for ddp_options in options:
        model = build()
        ddp = DistributedDataParallel(model, **ddp_options)
        for step in range(3):
            model.zero_grad()
            ddp(*views(rank, step)).backward()
            assert_same(gradients(model), expected[step])
        assert model.losses is not None
        assert model.losses.shape == (2,)

    model = build()
    ddp = DistributedDataParallel(model)
    with ddp.no_sync():
        ddp(*views(rank, 0)).backward()
    ddp(*views(rank, 1)).backward()
    assert_same(gradients(model), {name: g + expected[1][name] for name, g in expected[0].items()})

    model = build()
    with pytest.warns(UserWarning, match=r"this process's own gradients.*average_gradients\(model.parameters\(\)\)"):
        model.local_step(*views(rank, 0))
    average_gradients(model.parameters())
    assert_same(gradients(model), expected[0])
    assert model.backbone.fc.weight.grad is None

    partly = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(1))]
    if rank == 0:
        partly[0].grad = torch.full((3,), 4.0)
    partly[1].grad = torch.full((2, 2), float(rank))
    average_gradients(partly)
    assert torch.equal(partly[0].grad, torch.full((3,), 2.0))  # type: ignore[arg-type]
    assert torch.equal(partly[1].grad, torch.full((2, 2), 0.5))  # type: ignore[arg-type]
    assert partly[2].grad is None


def test_gradients_are_the_mean_of_the_processes(tmp_path: Path) -> None:
    expected = [mean_gradients(step) for step in range(3)]
    processes.run(work, WORLD, tmp_path, expected)


def test_one_process_averages_nothing_and_does_not_warn() -> None:
    assert world_size() == 1
    model = LocalWrapper(small_net(), [0, 1, 2], decoder=MLPDecoder, example=torch.rand(2, 3, 8, 8), loss=InfoNCE())
    model.local_step(*views(0, 0))
    before = gradients(model)
    average_gradients(model.parameters())
    assert_same(gradients(model), before, tolerance=0)
