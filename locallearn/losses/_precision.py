"""Matrix products that add up in at least single precision, whatever autocast is in force."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

LN2 = 0.6931471805599453  # nats per bit

_onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
_half_to_single = hasattr(torch.ops.aten.mm, "dtype")  # torch 2.8; on CUDA only


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off, where it is on; the meta device has none."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def narrow(rows: Tensor, products: torch.dtype | None) -> Tensor:
    """Round rows to the type in which they are to be multiplied, if it is not theirs."""
    return rows if products is None else rows.to(products)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a by the transpose of b: (n, k), (m, k) -> (n, m), from half precision to single. Not differentiable.

    Single precision on a CPU with AVX-512 goes to oneDNN: MKL, torch's default, takes a slow path on AMD processors (100
    against 220 GFLOP/s on one core of an EPYC; with AVX2 alone they are level). It begins later, so small products stay
    with torch. Half precision is exact there, and no faster.
    """
    if a.dtype in (torch.bfloat16, torch.float16):
        if _half_to_single and a.is_cuda:
            return torch.mm(a, b.t(), out_dtype=torch.float32)
        return product(a.float(), b.float())
    large = a.shape[0] * a.shape[1] * b.shape[0] > 2**21
    if _avx512 and large and _onednn_linear is not None and a.device.type == "cpu" and a.dtype == torch.float32:
        product_: Tensor = _onednn_linear(a, b, None, "none", [], "")
        return product_
    return a @ b.t()


def pull(weights: Tensor, rows: Tensor) -> Tensor:
    """Add up rows by weights in single precision or better: (n, m), (m, k) -> (n, k).

    The weights are rounded to the rows' type. Half precision's narrow range (float16) is put where they are: what it
    loses is 2^-38 of the largest.
    """
    if rows.dtype == torch.float16:
        top = torch.finfo(weights.dtype).max
        stretch = (2**14 / weights.abs().amax()).clamp(max=top)
        return product((weights * stretch).half(), rows.t()) / stretch
    return product(weights.to(rows.dtype), rows.t())


def pull_back(weights: Tensor, rows: Tensor) -> Tensor:
    """Add up rows by the transpose of weights: (n, m), (n, k) -> (m, k)."""
    if rows.dtype == torch.float16:
        return pull(weights.t(), rows)
    # the rows to the left: oneDNN copies what it gets transposed there, and they are smaller than the weights
    return product(rows.t(), weights.to(rows.dtype).t()).t()
