"""Trees of tensors as one run of bytes, so that a message is sent and received as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from locallearn._walk.trees import mapped

_ALIGNED = 64  # bytes, for any dtype
_HEADER = 8  # whole numbers of 64 bits


class Kind(IntEnum):
    """What a message is."""

    TENSORS = 1
    CHANGED = 2  # the next message has another form, which follows
    FLUSHED = 3  # none follows before the next step
    FAILED = 4  # a rank is lost


class Header(NamedTuple):
    """What precedes the tensors.

    Attributes:
        kind: of message.
        step: the sender's.
        unit: whose gradient it is, or -1.
        rank: where a failure was.
        seed: of the step's random numbers; meaningful if ``seeded``.
        seeded: whether there is one.
    """

    kind: int
    step: int
    unit: int = -1
    rank: int = -1
    seed: int = 0
    seeded: int = 0


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor in a tree: which one it is; or of which shape and dtype, on the meta device, with nothing to send."""

    index: int
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None


class _Place(NamedTuple):
    """Where a tensor lies among the bytes; strides tell channels last."""

    begin: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    differentiable: bool


@dataclass(frozen=True)
class Form:
    """What a message looks like: a tree, with a place instead of each of its tensors.

    Example:
        >>> form = Form.of({"outlet": torch.ones(2, 3), "views": 2})
        >>> buffer = form.pack([torch.ones(2, 3)], Header(Kind.TENSORS, step=5))
        >>> form.header(buffer).step, form.unpack(buffer)["outlet"].shape
        (5, torch.Size([2, 3]))
    """

    tree: Any
    places: tuple[_Place, ...]

    @staticmethod
    def of(tree: Any) -> Form:
        """The form of messages that hold ``tree``."""
        places: list[_Place] = []
        known: dict[Tensor, _Slot] = {}

        def slot(tensor: Tensor) -> _Slot:
            if tensor.is_meta:
                return _Slot(-1, tuple(tensor.shape), tensor.dtype)
            if tensor not in known:
                known[tensor] = _Slot(len(places))
                at = places[-1].begin + places[-1].nbytes if places else _HEADER * 8
                begin = -(-at // _ALIGNED) * _ALIGNED
                size, shape = tensor.numel() * tensor.element_size(), tuple(tensor.shape)
                stride = tensor.stride() if _dense(tensor) else torch.empty(shape, device="meta").stride()
                places.append(_Place(begin, size, tensor.dtype, shape, tuple(stride), tensor.requires_grad))
            return known[tensor]

        return Form(mapped(slot, tree), tuple(places))

    @property
    def nbytes(self) -> int:
        """How long such a message is."""
        return max([_HEADER * 8, *(place.begin + place.nbytes for place in self.places)])

    def empty(self, device: torch.device) -> Tensor:
        """Room for a message."""
        return torch.empty(self.nbytes, dtype=torch.uint8, device=device)

    def pack(self, tensors: list[Tensor], header: Header, device: torch.device | None = None) -> Tensor:
        """The message as bytes; without tensors, only its header means something."""
        buffer = self.empty(tensors[0].device if device is None else device)
        numbers = torch.tensor([*header, *[0] * (_HEADER - len(header))], dtype=torch.int64)
        buffer[: _HEADER * 8].view(torch.int64).copy_(numbers)
        for place, tensor in zip(self.places, tensors, strict=False):
            _region(buffer, place).copy_(tensor.detach())
        return buffer

    @staticmethod
    def header(buffer: Tensor) -> Header:
        """What precedes the tensors in a message."""
        numbers: list[int] = buffer[: _HEADER * 8].view(torch.int64).tolist()
        return Header(*numbers[: len(Header._fields)])

    def unpack(self, buffer: Tensor) -> Any:
        """The tree; its tensors are views of ``buffer``, and leaves that ask for a gradient where they had a graph."""
        regions = [_region(buffer, place).requires_grad_(place.differentiable) for place in self.places]

        def tensor(slot: _Slot) -> Tensor:
            if slot.index < 0:
                return torch.empty(slot.shape, dtype=slot.dtype, device="meta")
            return regions[slot.index]

        return mapped(tensor, self.tree, _Slot)


def _region(buffer: Tensor, place: _Place) -> Tensor:
    flat = buffer[place.begin : place.begin + place.nbytes].view(place.dtype)
    return flat.as_strided(place.shape, place.stride)


def _dense(tensor: Tensor) -> bool:
    """Whether its elements fill a run of memory in some order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return tensor.numel() > 0
