"""Which axis of an outlet holds the channels: what the modules say that make and read it, else what its shape tells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.weak import WeakIdKeyDictionary

from locallearn._walk.undo import Reverted, attached


class Channels:
    """What the modules of ``backbone`` say of tensors, during a forward inside of :meth:`heard`.

    Convolutions, batch, group and instance norms have the channels in axis 1, layer norms and embeddings in the last one. So do
    linear layers, which are asked last, since they also mix along positions. Tensors are told apart by numbers, and none of
    them is kept.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self._says = {module: axis for module in backbone.modules() if (axis := _said(module)) is not None}
        self._numbers: Any = WeakIdKeyDictionary()
        self._given = 0
        self._sure, self._linear = _Sayings(), _Sayings()

    def heard(self) -> Reverted[None]:
        """Hooks on the modules that say something."""
        return attached(dict.fromkeys(self._says, self._reads), dict.fromkeys(self._says, self._makes))

    def number(self, tensor: Tensor) -> int:
        """The same for the same object, as long as it lives."""
        if tensor not in self._numbers:
            self._numbers[tensor] = self._given
            self._given += 1
        found: int = self._numbers[tensor]
        return found

    def axis(self, shape: torch.Size, *numbers: int) -> int | None:
        """Of a tensor: said by who reads it or has made it, else by all who have seen one of its shape.

        Args:
            shape: of the tensor.
            numbers: of the objects that it was, the last one first in doubt.
        """
        if len(shape) < 3:
            return 1
        sure, linear, mixed = self._sure, self._linear, shape[1] == shape[-1]  # such a shape may be either
        told = sure.of(numbers) or (None if mixed else sure.like(shape)) or linear.of(numbers)
        return told or sure.like(shape) or linear.like(shape)

    def _reads(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args and isinstance(args[0], Tensor) and not isinstance(module, nn.Embedding):
            self._note(module, args[0])

    def _makes(self, module: nn.Module, args: Any, output: object) -> None:
        if isinstance(output, Tensor):
            self._note(module, output)

    def _note(self, module: nn.Module, tensor: Tensor) -> None:
        if isinstance(module, _ConvNd) and tensor.ndim != len(module.kernel_size) + 2:
            return  # one input without a batch
        said, axis = self._linear if isinstance(module, nn.Linear) else self._sure, self._says[module]
        said.by_tensor[self.number(tensor)] = axis
        said.by_shape.setdefault(tensor.shape, set()).add(axis)


class _Sayings:
    def __init__(self) -> None:
        self.by_tensor: dict[int, int] = {}
        self.by_shape: dict[torch.Size, set[int]] = {}

    def of(self, numbers: Sequence[int]) -> int | None:
        said = [self.by_tensor[number] for number in numbers if number in self.by_tensor]
        return said[-1] if said else None

    def like(self, shape: torch.Size) -> int | None:
        said = self.by_shape.get(shape, set())
        return next(iter(said)) if len(said) == 1 else None


def _said(module: nn.Module) -> int | None:
    if isinstance(module, torch.jit.ScriptModule):
        return None
    if isinstance(module, _ConvNd | _BatchNorm | _InstanceNorm | nn.GroupNorm):
        return 1
    if type(module).forward is nn.LayerNorm.forward:  # others of that name permute before or after
        return -1 if len(module.normalized_shape) == 1 else None  # type: ignore[arg-type]
    return -1 if type(module).forward in (nn.Linear.forward, nn.Embedding.forward) else None


def channel_axis(shape: Sequence[int]) -> int:
    """The axis that holds the channels of a feature map of that shape, where no module says it.

    ======================================  ====  ==================================================
    shape                                   axis
    ======================================  ====  ==================================================
    ``(N, C)``                              1     vectors
    ``(N, T, C)``                           -1    tokens (a 1-d convolution's ``(N, C, L)`` looks the same)
    ``(N, S, S, C)`` with ``C != S``        -1    square maps with channels last, as in torchvision's Swin
    any other                               1     channels first
    ======================================  ====  ==================================================

    Where the shape misleads, :func:`agreed_axis` finds out.

    Example:
        >>> channel_axis((2, 64, 56, 56)), channel_axis((2, 56, 56, 96))
        (1, -1)
    """
    if len(shape) == 3 or (len(shape) == 4 and shape[1] == shape[2] != shape[3]):
        return -1
    return 1


def agreed_axis(features: Tensor, weights: Iterable[torch.Size]) -> int:
    """The axis that :func:`channel_axis` tells, unless the stage's weights tell another.

    Raises:
        ValueError: if no weight has the size of that axis, but some weight puts out what the other candidate has.
    """
    at = channel_axis(features.shape)
    shape, other = tuple(features.shape), -1 if at == 1 else 1
    square = at == 1 and features.ndim > 3 and len(set(shape[2:])) == 1  # maps with channels first, whatever their size
    sizes = [size for size in weights if len(size)]
    known = {size[0] for size in sizes} | {size[1] for size in sizes if len(size) > 1}
    if features.ndim > 2 and not square and shape[at] not in known and shape[other] in {size[0] for size in sizes}:
        raise ValueError(
            f"which axis of an outlet of shape {shape} holds the channels? Its shape tells axis {at}, of size {shape[at]}, but "
            f"the stage's weights have size {shape[other]}, that of axis {other}. Say channel_axis={other} (or {at}): "
            f"LocalWrapper(..., channel_axis={other})"
        )
    return at
