"""How many processes there are, and the rows of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ALONE = ContextVar("_ALONE", default=False)


@contextmanager
def apart() -> Iterator[None]:
    """While open, this process computes something that the others do not, so that none answers: losses take its rows alone."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def is_apart() -> bool:
    """Whether :func:`apart` is open."""
    return _ALONE.get()


def in_use() -> bool:
    """Whether this process belongs to a group, be it of one."""
    return dist.is_available() and dist.is_initialized()


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks in `group`, by default of all; 1 where torch.distributed is not in use.

    Raises:
        ValueError: this process does not belong to `group`.
        TypeError: `group` is no process group.
    """
    if group is None:
        return dist.get_world_size() if in_use() else 1
    if not in_use():
        raise ValueError("group= needs torch.distributed.init_process_group() first; leave it out in a single process")
    not_mine: object = dist.GroupMember.NON_GROUP_MEMBER
    if group == not_mine or (isinstance(group, dist.ProcessGroup) and dist.get_world_size(group) < 1):
        raise ValueError(
            f"rank {dist.get_rank()} does not belong to group=; give each rank a group that it is in, "
            "such as the first that torch.distributed.new_subgroups() returns"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group must be a process group, from torch.distributed.new_group() or a device mesh's get_group(); got "
            f"{type(group).__name__}"
        )
    return dist.get_world_size(group)


def row_counts(x: Tensor, group: dist.ProcessGroup | None = None) -> list[int]:
    """Every rank's number of rows of `x`, in the order of the group's ranks.

    Raises:
        ValueError: on every rank, if the ranks' tensors differ in more than the number of rows.
    """
    shape = torch.tensor(x.shape, device=x.device)
    gathered = [torch.empty_like(shape) for _ in range(world_size(group))]
    dist.all_gather(gathered, shape, group=group)
    shapes = [tuple(other.tolist()) for other in gathered]
    if any(other[1:] != shapes[0][1:] for other in shapes):
        raise ValueError(f"ranks may differ in the number of rows and in nothing else; their tensors are {shapes}")
    return [rows for rows, *_ in shapes]


def gather(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Every rank's `x`, in the order of the group's ranks, without a gradient: (n, ...) -> [(n_0, ...), (n_1, ...), ...].

    `counts` holds n_0, n_1, ... and is the same on every rank; see `row_counts`.
    """
    x, most = x.detach(), max(counts)
    padded = x.contiguous() if x.shape[0] == most else torch.cat([x, x.new_zeros(most - x.shape[0], *x.shape[1:])])
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group=group)
    return [part[:count] for part, count in zip(gathered, counts, strict=True)]


def gather_with_gradient(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """As `gather`; in backward, each rank's `x` receives the sum of its gradients on all ranks."""
    return list(_Gather.apply(x, counts, group))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(gather(x, counts, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        sums = [grad.clone(memory_format=torch.contiguous_format) for grad in grads]
        for rank, grad in enumerate(sums):
            everywhere = rank if ctx.group is None else dist.get_global_rank(ctx.group, rank)
            dist.reduce(grad, dst=everywhere, group=ctx.group)
        return sums[dist.get_rank(ctx.group)], None, None
