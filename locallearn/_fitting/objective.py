"""What a unit is trained on: its decoder's outputs for the views, and the loss on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from math import inf
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from locallearn._walk.trees import tensors

Loss: TypeAlias = Callable[..., Tensor]


def unit_loss(k: int, decoder: nn.Module, loss: Loss, views: int, targets: Any, features: Tensor) -> Tensor:
    """The loss of unit ``k`` on an outlet that holds ``views`` views along its first axis, as a scalar.

    Raises:
        TypeError: if the loss returns no tensor.
        ValueError: if it is not a scalar or has no graph, or if the decoder's output cannot be split into the views.
    """
    output = decoder(features)
    value = loss(*_split(k, output, views), *([] if targets is None else [targets]))
    if not isinstance(value, Tensor):
        raise TypeError(f"the loss of unit {k} returns a scalar tensor; got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(
            f"the loss of unit {k} returns a scalar; got shape {tuple(value.shape)}. Reduce it, for example with "
            "reduction='mean'"
        )
    if value.is_complex():
        raise ValueError(
            f"the loss of unit {k} is complex, {value.dtype}; a gradient starts from a real number. Take abs() or its real part"
        )
    if isinstance(output, Tensor) and output.requires_grad and not value.requires_grad:
        raise ValueError(
            f"the loss of unit {k} has lost the graph of what it was given; does it detach, or use no_grad?"
        )
    return value.reshape(()) if value.ndim else value


def _split(k: int, output: Any, views: int) -> Sequence[Any]:
    if views == 1:
        return [output]
    if not isinstance(output, Tensor) or output.ndim == 0 or len(output) % views:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ValueError(
            f"the decoder of unit {k} returns one tensor, the {views} views along its first axis; got {got}"
        )
    return output.chunk(views)


def registered(loss: Loss | Sequence[Loss], units: int) -> nn.Module | Loss:
    """One loss for all units as it is, or a list of one per unit as a module list."""
    if isinstance(loss, nn.ModuleList | list | tuple):
        if len(loss) != units:
            raise ValueError(f"loss lists {len(loss)} losses for {units} units; it needs one for all, or one per unit")
        return nn.ModuleList(one if isinstance(one, nn.Module) else _Function(one) for one in loss)
    if not callable(loss):
        raise TypeError(
            f"loss is a callable on the decoders' outputs, such as InfoNCE(), or a list of them; got {loss!r}"
        )
    if isinstance(loss, type):
        raise TypeError(f"loss is an object, such as {loss.__name__}(); got the class {loss.__name__} itself")
    return loss


class _Function(nn.Module):
    """A plain function in a list of losses."""

    def __init__(self, function: Loss) -> None:
        super().__init__()
        self.function = function

    def forward(self, *outputs: Any) -> Tensor:
        return self.function(*outputs)


def warn_of_fp16(views: Sequence[object]) -> None:
    """To be called by what the user calls."""
    device = next((tensor.device.type for view in views for tensor in tensors(view)), "cpu")
    available = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if available and torch.get_autocast_dtype(device) == torch.float16:
        warnings.warn(
            "fp16 autocast without grad_scale=: the local backward runs on unscaled losses, and small gradients are lost. Pass "
            "grad_scale=scaler.get_scale() to model(*views), or grad_scale=scaler.scale(torch.ones(())) to local_step",
            stacklevel=3,
        )


def check_scale(scale: float | Tensor | None) -> None:
    """Checks what losses are to be multiplied by; the value of a tensor is not looked at, which might wait for a GPU.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is not one, or not more than 0 and finite.
    """
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(f"grad_scale is one number, the scaler's; got a tensor of shape {tuple(scale.shape)}")
    elif scale is not None:
        if not isinstance(scale, Real):
            raise TypeError(f"grad_scale is a number, such as scaler.get_scale(); got {scale!r}")
        if not 0 < scale < inf:
            raise ValueError(f"grad_scale is more than 0, and finite; got {scale}")
