"""Embeddings to rows whose dot products are logits in bits, whatever their length, and what transforms ask of that."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from locallearn.losses._precision import LN2
from locallearn.losses._second import Once


def transformed(*tensors: Tensor) -> bool:
    """Whether `torch.func` is at work, or forward-mode differentiation: neither sees into an operator of our own."""
    if torch._C._are_functorch_transforms_active():
        return True
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)  # type: ignore[no-untyped-call]


def unit(x: Tensor, temperature: float | Tensor, plainly: bool = False) -> Tensor:
    """Scale rows so that their dot products are cosine / temperature in bits: (..., D) -> (..., D).

    A row of zeros stays one, and its gradient is zero. `plainly` uses torch's own operators alone, which can be
    differentiated twice and forwards; else nothing is kept for the backward beside the result.
    """
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(()).to(x.dtype)
        factor: Tensor = (temperature * LN2) ** -0.5
        return unit(x, 1 / LN2, plainly) * factor
    length: float = (temperature * LN2) ** -0.5
    if not plainly:
        rows: Tensor = _Unit.apply(x, length)
        return rows
    x = x / _largest(x)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=0.5)
    plain: Tensor = x * (length / norm)
    return plain


def _largest(x: Tensor) -> Tensor:
    """Return what to divide by, so that squares neither overflow nor vanish: a norm is at least one then, or zero."""
    largest = x.detach().abs().amax(-1, keepdim=True)  # vector_norm(x, inf) takes 17 times as long
    return largest.masked_fill(largest == 0, math.inf)


class _Unit(torch.autograd.Function):
    """x / |x| · length: (..., D) -> (..., D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, length: float) -> Tensor:
        largest = _largest(x)
        rows = x / largest
        shrink = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_(min=0.5).div_(length)
        rows /= shrink
        ctx.save_for_backward(rows, (shrink * largest).clamp_(min=torch.finfo(x.dtype).tiny))
        ctx.length = length
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows, shrink = ctx.saved_tensors
        along = (grad * rows).sum(-1, keepdim=True)
        moved = torch.addcmul(grad, rows, along, value=-(ctx.length**-2)) / shrink
        return Once.apply(rows, moved) if torch.is_grad_enabled() else moved, None
