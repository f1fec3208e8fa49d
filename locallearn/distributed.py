"""Several processes: gradients averaged over all of them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of processes that train together: 1 where ``torch.distributed`` is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replaces every ``.grad`` by its mean over all processes, as DistributedDataParallel would.

    For use after ``model.local_step``, whose backward DistributedDataParallel does not see. All processes call it with the
    same parameters. A gradient that only some of them have counts as zero in the others; one that nobody has stays ``None``.

    Args:
        parameters: those to average, such as ``model.parameters()``.
    """
    if world_size() == 1:
        return
    kept = sorted((t for t in parameters if t.requires_grad), key=lambda t: (str(t.device), str(t.dtype)))
    for _, group in groupby(kept, key=lambda t: (t.device, t.dtype)):
        tensors = list(group)
        held = torch.tensor([t.grad is not None for t in tensors], dtype=torch.int32, device=tensors[0].device)
        dist.all_reduce(held)
        owned = [t for t, count in zip(tensors, held.tolist(), strict=True) if count]
        if not owned:
            continue
        flat = torch.cat([(torch.zeros_like(t) if t.grad is None else t.grad).flatten() for t in owned])
        dist.all_reduce(flat)
        flat /= world_size()
        for t, mean in zip(owned, torch.split(flat, [t.numel() for t in owned]), strict=True):
            if t.grad is None:
                t.grad = mean.view_as(t).clone()
            else:
                t.grad.copy_(mean.view_as(t))
