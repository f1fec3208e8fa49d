"""Two views whose matrix is small: it is kept for the backward, which then need not multiply again.

one-way: a looks at b        two-way: both ways       NT-Xent: [a, b] looks at itself, symmetric
    b                            b                            a     b
a   o # #                    a   o # #                    a   .#### o####      o  an anchor's positive
    # o #                        # o #                    b   o#### .####      .  itself
    # # o                        # # o                                         #  its negatives
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from locallearn.losses._precision import LN2, full_precision, narrow, product, pull, pull_back
from locallearn.losses._second import Once


class Kept(torch.autograd.Function):
    """Losses of the anchors, and whether a positive is nearest: views in bits -> (A, N) in nats, (A, N).

    The views are two, (N, D) each, and for NT-Xent one above the other, (2N, D). No logit may exceed 60 bits. What is
    nearest is told only if `top1`. `products` is the type in which rows are multiplied, if not their own.
    """

    @staticmethod
    def forward(ctx: Any, form: str, top1: bool, products: torch.dtype | None, *views: Tensor) -> tuple[Tensor, Tensor]:
        rows = [narrow(view, products) for view in views]
        powers = product(rows[0], rows[-1])
        n = len(powers) // 2 if form == "nt-xent" else len(powers)
        positive = powers.diagonal(n if form == "nt-xent" else 0).clone()  # (N,), the same in both directions
        if products is not None:
            positive = (views[0][:n] * views[-1][-n:]).sum(1)  # as exact as where there are tiles
        for diagonal in _left_out(powers, n, form):
            diagonal.fill_(-torch.inf)
        dims = {"nt-xent": [1], "two-way": [1, 0], "one-way": [1]}[form]
        shape = (1 if form == "one-way" else 2, n)
        if top1:
            right = positive > torch.cat([powers.amax(dim) for dim in dims]).view(shape)
        else:
            right = torch.zeros(shape, dtype=torch.bool, device=powers.device)
        powers.exp2_()
        totals = torch.cat([powers.sum(dim) for dim in dims]).view(shape)
        ahead = (positive - totals.log2()) * LN2  # in nats: (A, N)
        ctx.save_for_backward(powers, totals, ahead, *views)
        ctx.form, ctx.products = form, products
        ctx.mark_non_differentiable(right)
        return -F.logsigmoid(ahead), right

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        powers, totals, ahead, *views = ctx.saved_tensors
        with torch.no_grad(), full_precision(powers.device):
            rows = [narrow(view, ctx.products) for view in views]
            moved = _backward(rows, powers, totals, grad * torch.sigmoid(-ahead) * LN2, ctx.form)
        if torch.is_grad_enabled():
            moved = [Once.apply(view, part) for view, part in zip(views, moved, strict=True)]
        return None, None, None, *moved


def _backward(rows: Sequence[Tensor], powers: Tensor, totals: Tensor, share: Tensor, form: str) -> list[Tensor]:
    n, positive = share.shape[1], -share.sum(0)
    scale = share / totals.masked_fill(totals == 0, torch.inf)  # without negatives nothing moves
    if form == "nt-xent":
        weights = powers * (scale.view(-1, 1) + scale.view(-1))
        weights.diagonal(n).copy_(positive)
        weights.diagonal(-n).copy_(positive)
        return [pull(weights, rows[0])]
    a, b = rows
    if form == "one-way" and a.dtype != torch.float16:  # whose range does not hold the powers of all rows at once
        of_row, positive = scale[0][:, None], positive[:, None]  # rows are scaled in place of the matrix
        pulled = pull(powers, b), pull_back(powers, (of_row * a).to(a.dtype))
        return [torch.addcmul(positive * b, of_row, pulled[0]), torch.addcmul(pulled[1], positive, a)]
    weights = powers * (scale[0][:, None] if form == "one-way" else scale[0][:, None] + scale[1])
    weights.diagonal().copy_(positive)
    return [pull(weights, b), pull_back(weights, a)]


def _left_out(powers: Tensor, n: int, form: str) -> list[Tensor]:
    return [powers.diagonal(k) for k in ((0, n, -n) if form == "nt-xent" else (0,))]
