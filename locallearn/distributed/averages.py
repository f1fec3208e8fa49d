"""The mean of gradients over processes, at once or while others are still computed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from locallearn.distributed.rows import world_size


def average_gradients(parameters: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replaces every ``.grad`` by its mean over all processes, as DistributedDataParallel would.

    For use after ``model.local_step``, whose backward DistributedDataParallel does not see; or give that a ``group=``, which
    does the same while the step still runs. All processes call it with the same parameters. A gradient that only some of
    them have counts as zero in the others; one that nobody has stays ``None``, and one that all have sparse stays sparse.

    A ``DTensor`` is one tensor, whose parts lie in several processes. Where these are all the processes of ``group``, there
    is one gradient and nothing to average; where only one of them is in ``group``, as in data parallel training of models
    that are tensor parallel inside, its part is averaged.

    Args:
        parameters: those to average, such as ``model.parameters()``.
        group: the processes; all of them by default.

    Raises:
        ValueError: if several parts of a DTensor lie in ``group``, and others elsewhere.
    """
    if world_size(group) == 1:
        return
    kept = [weight for weight in parameters if weight.requires_grad and not spread(weight, group)]
    for alike in by_kind(kept):
        dense, sparse = _held(alike, group)
        in_flight = Flight([weight for weight, held in zip(alike, dense, strict=True) if held], group)
        for weight, only in zip(alike, (s and not d for s, d in zip(sparse, dense, strict=True)), strict=True):
            if only:
                _average_sparse(weight, group)
        in_flight.land()


class Flight:
    """Gradients, flat, on their way around the group: a weight without one sends zeros.

    Args:
        weights: of one device and dtype, the same on every rank; those that have no gradient anywhere keep none.
        group: the processes.
    """

    def __init__(self, weights: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
        self._weights, self._work = list(weights), None
        if not weights:
            return
        with torch.no_grad():
            parts = [
                local_part(torch.zeros_like(w) if w.grad is None else w.grad).to_dense().flatten() for w in weights
            ]
            self._flat = torch.cat(parts) / dist.get_world_size(group)  # before the sum, which fp16 might not hold
            held = [float(weight.grad is not None) for weight in weights]
            self._flat = torch.cat([self._flat, torch.tensor(held, dtype=self._flat.dtype, device=self._flat.device)])
        self._work = dist.all_reduce(self._flat, group=group, async_op=True)

    def land(self) -> None:
        """Waits, and puts the means into ``.grad``."""
        if self._work is None:
            return
        self._work.wait()
        sizes = [local_part(weight).numel() for weight in self._weights]
        *means, held = torch.split(self._flat, [*sizes, len(sizes)])
        with torch.no_grad():
            for weight, mean, anywhere in zip(self._weights, means, held.tolist(), strict=True):
                if not anywhere:
                    continue
                if weight.grad is None or weight.grad.is_sparse:
                    weight.grad = torch.zeros_like(weight)
                part = local_part(weight.grad)
                part.copy_(mean.view_as(part))


def by_kind(weights: Iterable[Tensor]) -> list[list[Tensor]]:
    """Those of one device and dtype together, in an order that is the same on every rank."""

    def kind(weight: Tensor) -> tuple[str, str]:
        return str(weight.device), str(weight.dtype)

    return [list(alike) for _, alike in groupby(sorted(weights, key=kind), key=kind)]


def spread(weight: Tensor, group: dist.ProcessGroup | None) -> bool:
    """Whether ``weight`` is one tensor in parts over all of ``group``.

    Raises:
        ValueError: if some of its parts are in ``group`` and some are not.
    """
    if not is_dtensor(weight):
        return False
    mesh = set(weight.device_mesh.mesh.flatten().tolist())  # type: ignore[attr-defined]
    ours = set(dist.get_process_group_ranks(group or dist.group.WORLD))
    if ours <= mesh:
        return len(ours) > 1
    if len(ours & mesh) > 1:
        raise ValueError(
            f"a DTensor of shape {tuple(weight.shape)} lies in parts on ranks {sorted(mesh)}; a mean over ranks {sorted(ours)} "
            "would mix its parts. Give the processes that hold the same part: group=mesh['dp'].get_group(), by the name of the "
            "data parallel dimension"
        )
    return False


def covers_the_world(weights: Iterable[Tensor]) -> bool:
    """Whether one of ``weights`` lies in parts over all processes, which then work on one batch together."""
    return any(is_dtensor(w) and w.device_mesh.size() == dist.get_world_size() for w in weights)  # type: ignore[attr-defined]


def is_dtensor(tensor: object) -> bool:
    """Whether it is one tensor in parts over several processes."""
    module = sys.modules.get("torch.distributed.tensor")  # slow to import, and nobody has one who has not
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """This process's part; a view."""
    local: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return local


def _held(weights: Sequence[Tensor], group: dist.ProcessGroup | None) -> tuple[list[int], list[int]]:
    """Whether some rank has a dense gradient of each weight; and a sparse one."""
    grads = [weight.grad for weight in weights]
    kinds = [[g is not None and not g.is_sparse for g in grads], [g is not None and g.is_sparse for g in grads]]
    held = torch.tensor(kinds, dtype=torch.int32, device=weights[0].device)
    dist.all_reduce(held, dist.ReduceOp.MAX, group=group)
    dense, sparse = held.tolist()
    return dense, sparse


def _average_sparse(weight: Tensor, group: dist.ProcessGroup | None) -> None:
    ranks = dist.get_world_size(group)
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, None if weight.grad is None else weight.grad.cpu(), group=group)
    first, *others = [part for part in parts if part is not None]
    weight.grad = (sum(others, first).coalesce() / ranks).to(weight.device)
