"""Second derivatives: there is none of a loss that was not computed by torch's own operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    """Prepare an operator for `refuse`."""


def refuse(ctx: Any, *grads: object) -> tuple[object, ...]:
    """Refuse to differentiate a backward."""
    raise NotImplementedError(
        "InfoNCE computed in tiles has no second derivative; info_nce(..., tile=0) builds the whole matrix and has one"
    )


class Once(torch.autograd.Function):
    """A gradient that cannot be differentiated again: (what it depends on, gradient) -> gradient."""

    @staticmethod
    def forward(ctx: Any, of: Tensor, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    backward = staticmethod(refuse)
