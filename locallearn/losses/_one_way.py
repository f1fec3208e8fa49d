"""The one-way form in a single pass: some queries against all keys at a time, the gradient with the loss.

A query's logits are complete at once, so that its weights are known before they are gone: three matrix products instead
of the four of tiles that are computed again in backward. It needs equal weights for all losses, as in a sum, and keys
few enough to stay in a cache: beyond `MOST_KEYS` tiles are faster.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from locallearn.losses._precision import LN2, full_precision, product
from locallearn.losses._tiles import refuse, save_nothing

MOST_KEYS = 4096


def one_way(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses in nats, and where the key is nearest: (N, D), (N, D) -> (), (N,); rows in bits."""
    differentiated = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    total, right, *_ = _one_way(query, key, differentiated)
    return total, right


@torch.library.custom_op("locallearn::one_way", mutates_args=())
def _one_way(query: Tensor, key: Tensor, differentiated: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = query.shape[0]
    losses, right = query.new_empty(n), query.new_empty(n, dtype=torch.bool)
    moved = [torch.zeros_like(rows) if differentiated else rows.new_empty(0) for rows in (query, key)]
    chunk = max(64, 2 ** (17 if query.device.type == "cpu" else 24) // n)
    with full_precision(query.device):
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            logits = product(query[rows], key)  # (C, N)
            own = logits.diagonal(start)
            positive = own.clone()
            own.fill_(-torch.inf)
            largest = logits.amax(1)
            powers = logits.sub_(largest[:, None]).exp2_()
            negatives = powers.sum(1).log2_().add_(largest)
            losses[rows] = -F.logsigmoid((positive - negatives) * LN2)
            right[rows] = positive > largest
            if differentiated:
                weight = powers.mul_(torch.exp2(largest - torch.logaddexp2(negatives, positive))[:, None])
                own.copy_(-torch.sigmoid((negatives - positive) * LN2))
                moved[0][rows] = product(weight, key.t())
                moved[1] += product(weight.t(), query[rows].t())
    return losses.sum(), right, moved[0].mul_(LN2), moved[1].mul_(LN2)


@torch.library.custom_op("locallearn::one_way_backward", mutates_args=())
def _one_way_backward(grad: Tensor, total: Tensor, moved_query: Tensor, moved_key: Tensor) -> tuple[Tensor, Tensor]:
    return grad * moved_query, grad * moved_key  # the total is here for a second derivative to be noticed


@_one_way.register_fake
def _(query: Tensor, key: Tensor, differentiated: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    moved_query, moved_key = (torch.empty_like(x) if differentiated else x.new_empty(0) for x in (query, key))
    return query.new_empty(()), query.new_empty(query.shape[0], dtype=torch.bool), moved_query, moved_key


@_one_way_backward.register_fake
def _(grad: Tensor, total: Tensor, moved_query: Tensor, moved_key: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(moved_query), torch.empty_like(moved_key)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: tuple[Tensor, ...]) -> None:
    total, right, *moved = output
    ctx.save_for_backward(total, *moved)
    ctx.mark_non_differentiable(right, *moved)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *_one_way_backward(grad, *ctx.saved_tensors), None


_one_way.register_autograd(_backward, setup_context=_save)
_one_way_backward.register_autograd(refuse, setup_context=save_nothing)
