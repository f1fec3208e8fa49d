"""The norm of all ranks' gradients, to the bit that of one process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor


def total_norm(
    owned: Sequence[tuple[int, Tensor]], count: int, kind: float, group: dist.ProcessGroup, device: torch.device
) -> Tensor:
    """The norm of the gradients of a whole model.

    Each rank fills in the norms of its own weights, at their places among the model's, and the norm of all is taken over
    them in that order, as ``torch.nn.utils.get_total_norm`` does.

    Args:
        owned: this rank's gradients, with the places of their weights.
        count: of weights in the model.
        kind: 2.0 for the Euclidean norm, ``inf`` for the largest element.
        group: the ranks.
        device: where messages lie.
    """
    told = torch.zeros(2, count, dtype=torch.float64, device=device)
    for place, gradient in owned:
        norm = torch.nn.utils.get_total_norm([gradient], kind)
        told[:, place] = torch.stack(
            [norm.double(), norm.new_tensor(1 + _DTYPES.index(norm.dtype), dtype=torch.float64)]
        )
    dist.all_reduce(told, group=group)
    held = told[1] > 0
    dtypes = [_DTYPES[int(index) - 1] for index in told[1, held].unique().tolist()]
    coarse = reduce(torch.promote_types, dtypes) if dtypes else torch.get_default_dtype()
    whole: Tensor = torch.linalg.vector_norm(told[0, held].to(coarse), kind)
    return whole


_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
