"""Two views whose matrix is small: it is kept for the backward, which then need not multiply again.

one-way: a looks at b        two-way: both ways       NT-Xent: [a, b] looks at itself, symmetric
    b                            b                            a     b
a   o # #                    a   o # #                    a   .#### o####      o  an anchor's positive
    # o #                        # o #                    b   o#### .####      .  itself
    # # o                        # # o                                         #  its negatives
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from locallearn.losses._precision import LN2, full_precision, narrow, product, pull, pull_back
from locallearn.losses._second import Once


class Kept(torch.autograd.Function):
    """Losses of the anchors, and whether a positive is nearest: z (2N, D) in bits -> (A, N) in nats, (A, N) or empty.

    `z` holds one view above the other, two rows each at least. No logit may exceed 60 bits. What is nearest is told only if
    `top1`. `products` is the type in which rows are multiplied, if not their own.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, form: str, top1: bool, products: torch.dtype | None) -> tuple[Tensor, Tensor]:
        n, rows = len(z) // 2, narrow(z, products)
        powers = product(rows, rows) if form == "nt-xent" else product(rows[:n], rows[n:])
        positive = powers.diagonal(n if form == "nt-xent" else 0).clone()  # (N,), the same in both directions
        if products is not None:
            positive = (z[:n] * z[n:]).sum(1)  # as exact as where there are tiles
        for diagonal in _left_out(powers, n, form):
            diagonal.fill_(-torch.inf)
        untold = torch.empty(0, dtype=torch.bool, device=z.device)
        right = positive > _along(powers, Tensor.amax, form) if top1 else untold
        totals = _along(powers.exp2_(), Tensor.sum, form)
        ahead = (positive - totals.log2()) * LN2  # in nats: (A, N)
        ctx.save_for_backward(z, powers, totals, ahead)
        ctx.form, ctx.products = form, products
        ctx.mark_non_differentiable(right)
        ctx.set_materialize_grads(False)
        return -F.logsigmoid(ahead), right

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: object) -> tuple[Tensor | None, ...]:
        z, powers, totals, ahead = ctx.saved_tensors
        with torch.no_grad(), full_precision(z.device):
            share = grad * torch.sigmoid(-ahead) * LN2  # of an anchor's negatives together: (A, N)
            moved = _backward(z, narrow(z, ctx.products), powers, share, share / totals, ctx.form)
        if torch.is_grad_enabled():
            moved = Once.apply(z, moved)
        return moved, None, None, None


def _along(matrix: Tensor, reduce: Callable[[Tensor, int], Tensor], form: str) -> Tensor:
    """Reduce what the anchors look at: (A, N)."""
    if form == "two-way":
        return torch.stack([reduce(matrix, 1), reduce(matrix, 0)])
    return reduce(matrix, 1).view(1 if form == "one-way" else 2, -1)


def _backward(z: Tensor, rows: Tensor, powers: Tensor, share: Tensor, scale: Tensor, form: str) -> Tensor:
    n = len(z) // 2
    if form == "one-way" and rows.dtype != torch.float16:  # whose range does not hold the powers of all rows at once
        a, b, of_pair, of_row = z[:n], z[n:], share[0][:, None], scale[0][:, None]
        pulled = of_row * pull(powers, rows[n:])  # rows are scaled in place of the matrix
        pulled_back = pull_back(powers, narrow(of_row * a, rows.dtype))
        ends = torch.addcmul(pulled, of_pair, b, value=-1), torch.addcmul(pulled_back, of_pair, a, value=-1)
        return torch.cat(ends)
    positive = -share.sum(0)
    if form == "nt-xent":
        weights = powers * (scale.view(-1, 1) + scale.view(-1))
        weights.diagonal(n).copy_(positive)
        weights.diagonal(-n).copy_(positive)
        return pull(weights, rows)
    weights = powers * (scale[0][:, None] if form == "one-way" else scale[0][:, None] + scale[1])
    weights.diagonal().copy_(positive)
    return torch.cat([pull(weights, rows[n:]), pull_back(weights, rows[:n])])


def _left_out(powers: Tensor, n: int, form: str) -> list[Tensor]:
    return [powers.diagonal(k) for k in ((0, n, -n) if form == "nt-xent" else (0,))]
