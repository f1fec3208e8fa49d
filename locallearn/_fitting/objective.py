"""What a unit is trained on: its decoder's outputs for the views, and the loss on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from locallearn._walk.segment import version

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
    return value.reshape(())


def _split(k: int, output: Any, views: int) -> Sequence[Any]:
    if views == 1:
        return [output]
    if not isinstance(output, Tensor) or output.ndim == 0 or len(output) % views:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ValueError(
            f"the decoder of unit {k} returns one tensor, the {views} views along its first axis; got {got}"
        )
    return output.chunk(views)


def concatenated(views: Sequence[Tensor], *, copy: bool = False) -> Tensor:
    """The views as one batch, without a graph, so that BatchNorm sees all of them.

    Args:
        views: of one shape, dtype and device.
        copy: whether the batch may be changed in place. If not, views that are neighbours in memory are the batch.

    Raises:
        TypeError: if one is not a tensor.
        ValueError: if there are none, or if their shapes differ.
    """
    if not views:
        raise ValueError("a local pass needs at least one view; got none")
    if wrong := [type(view).__name__ for view in views if not isinstance(view, Tensor)]:
        raise TypeError(f"views are tensors, one argument per view: model.local_step(view1, view2); got {wrong}")
    if len({(view.shape, view.dtype, view.device) for view in views}) > 1:
        kinds = "; ".join(f"{tuple(view.shape)} {view.dtype} on {view.device}" for view in views)
        raise ValueError(
            f"the views pass the backbone as one batch, so they need the same shape, dtype and device; got {kinds}"
        )
    first, storage = views[0].detach(), views[0].untyped_storage()
    if not copy and all(
        view.is_contiguous()
        and (not view.is_inference() or torch.is_inference_mode_enabled())  # no graph may save such a tensor
        and view.untyped_storage() is storage
        and view.storage_offset() == first.storage_offset() + k * first.numel()
        for k, view in enumerate(views)
    ):  # neighbours in memory, as from images.chunk(2), need no copy
        flat = first.as_strided((len(views) * first.numel(),), (1,))
        return flat.view(len(views) * len(first), *first.shape[1:])
    return torch.cat([view.detach() for view in views])


@contextmanager
def spared(batch: Tensor, views: Sequence[Tensor]) -> Iterator[None]:
    """Notices if ``batch`` is changed in place where it is the user's own ``views``.

    Raises:
        ViewsChangedError: at the end, if they were changed.
    """
    before = version(batch)
    yield
    if version(batch) != before and batch.untyped_storage() is views[0].untyped_storage():
        raise ViewsChangedError(
            "the backbone (or a loss) has changed the views of this step in place, which it did not when it was wrapped, in eval "
            "mode. Take what is not in place, such as Dropout(inplace=False). Or go on: from the next step on it gets a copy"
        )


class ViewsChangedError(RuntimeError):
    """The user's views were overwritten."""


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
    device = next((view.device.type for view in views if isinstance(view, Tensor)), "cpu")
    available = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if available and torch.get_autocast_dtype(device) == torch.float16:
        warnings.warn(
            "fp16 autocast without grad_scale=: the local backward runs on unscaled losses, and small gradients are lost. Pass "
            "grad_scale=scaler.get_scale() to model(*views), or grad_scale=scaler.scale(torch.ones(())) to local_step",
            stacklevel=3,
        )
