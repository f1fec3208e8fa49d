"""torch's engine, without what `torch.autograd` looks up and checks before each call: here it is known, and stages are many.

That takes 10 to 15 microseconds a call, about as long as a small stage. Tensor subclasses that take over what is done to
them (`__torch_function__`) go in by the front door.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import has_torch_function


def backward(roots: Sequence[Tensor], gradients: Sequence[Tensor] | None, inputs: Sequence[Tensor]) -> None:
    """Adds to ``.grad`` of ``inputs``, from ``roots`` with these ``gradients``; without any, from one real scalar."""
    starts, ends = tuple(roots), tuple(inputs)
    if has_torch_function((*starts, *ends)):
        torch.autograd.backward(starts, gradients, inputs=ends)
    else:
        begin = tuple(map(torch.ones_like, starts)) if gradients is None else tuple(gradients)
        _engine_run_backward(starts, begin, False, False, ends, allow_unreachable=True, accumulate_grad=True)


def grad(
    roots: Sequence[Tensor], gradients: Sequence[Tensor] | None, inputs: Sequence[Tensor], *, retain: bool = False
) -> Sequence[Tensor | None]:
    """The gradients at ``inputs``, ``None`` where there is none, likewise; ``retain`` keeps the graph."""
    starts, ends = tuple(roots), tuple(inputs)
    if has_torch_function((*starts, *ends)):
        return torch.autograd.grad(starts, ends, gradients, retain_graph=retain, allow_unused=True)
    begin = tuple(map(torch.ones_like, starts)) if gradients is None else tuple(gradients)
    return _engine_run_backward(starts, begin, retain, False, ends, allow_unreachable=True, accumulate_grad=False)
