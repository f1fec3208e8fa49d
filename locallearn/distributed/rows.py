"""How many processes there are, and the rows of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def in_use() -> bool:
    """Whether this process belongs to a group, be it of one."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of ranks; 1 where torch.distributed is not in use."""
    return dist.get_world_size() if in_use() else 1


def row_counts(x: Tensor) -> list[int]:
    """Every rank's number of rows of `x`, in the order of ranks.

    Raises:
        ValueError: on every rank, if the ranks' tensors differ in more than the number of rows.
    """
    shape = torch.tensor(x.shape, device=x.device)
    gathered = [torch.empty_like(shape) for _ in range(world_size())]
    dist.all_gather(gathered, shape)
    shapes = [tuple(other.tolist()) for other in gathered]
    if any(other[1:] != shapes[0][1:] for other in shapes):
        raise ValueError(f"ranks may differ in the number of rows and in nothing else; their tensors are {shapes}")
    return [rows for rows, *_ in shapes]


def gather(x: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Every rank's `x`, in the order of ranks, without a gradient: (n, ...) -> [(n_0, ...), (n_1, ...), ...].

    `counts` holds n_0, n_1, ... and is the same on every rank; see `row_counts`.
    """
    x, most = x.detach(), max(counts)
    padded = x.contiguous() if x.shape[0] == most else torch.cat([x, x.new_zeros(most - x.shape[0], *x.shape[1:])])
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return [part[:count] for part, count in zip(gathered, counts, strict=True)]


def gather_with_gradient(x: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """As `gather`; in backward, each rank's `x` receives the sum of its gradients on all ranks."""
    return list(_Gather.apply(x, counts))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
        return tuple(gather(x, counts))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        sums = [grad.clone(memory_format=torch.contiguous_format) for grad in grads]
        for rank, grad in enumerate(sums):
            dist.reduce(grad, dst=rank)
        return sums[dist.get_rank()], None
