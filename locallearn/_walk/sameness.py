"""Whether a second run of some modules did what the first one did, as far as it can be seen from outside."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_SAMPLE = 2**16  # elements of a tensor that are compared
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


def has_values(tensor: object) -> bool:
    """Whether it is a tensor whose numbers can be read: no fake one, none on ``meta``, no other kind of its own."""
    if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
        return False
    return tensor.device.type != "meta" and tensor.layout == torch.strided and not tensor.is_quantized


def samples(result: object) -> list[Tensor]:
    """Copies of evenly spaced elements of the tensors in ``result``."""
    return [_sample(leaf) for leaf in tree_leaves(result) if has_values(leaf)]


def _sample(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    while tensor.numel() > _SAMPLE:
        longest = max(range(tensor.ndim), key=tensor.shape.__getitem__)
        tensor = tensor[(slice(None),) * longest + (slice(None, None, -(-tensor.numel() // _SAMPLE)),)]
    return tensor.clone()


def alike(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether samples are equal, but for what a kernel that is not deterministic may change."""
    return len(one) == len(other) and all(map(_alike, one, other))


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    same = (one == other) | ((one != one) & (other != other))
    if not (one.is_floating_point() or one.is_complex()) or bool(same.all()):
        return bool(same.all())
    wide = torch.complex128 if one.is_complex() else torch.float64
    off = torch.where(same, 0, (one.to(wide) - other.to(wide)).abs())
    size = torch.where(one.isfinite(), one.to(wide).abs(), 0)
    return bool(off.norm() <= _tolerance(one.dtype) * size.norm())


def _tolerance(dtype: torch.dtype) -> float:
    """Of a norm, relative: many roundings, but far less than what a random number or a moving average changes."""
    return float(min(2e-2, 1e3 * torch.finfo(dtype).eps))


class OtherState:
    """State of some modules that a second run finds as the first one left it: all that is not registered.

    Random numbers of Python and numpy belong to it, and tensors and generators among the modules' plain attributes.
    """

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        self._parts = list(parts)
        self._before = dict(self._look())

    def changed(self) -> frozenset[str]:
        """What is not as it was when this was made, in words."""
        now = dict(self._look())
        return frozenset(what for what, state in self._before.items() if not _equal(state, now.get(what)))

    def _look(self) -> Iterator[tuple[str, Any]]:
        yield "the random numbers of Python's random", random.getstate()
        if (numpy := sys.modules.get("numpy")) is not None:
            yield "the random numbers of numpy.random", repr(numpy.random.get_state(legacy=False)["state"])
        for at, part in enumerate(self._parts):
            for name in part.__dict__.keys() - _OF_EVERY_MODULE:
                states = [_state(leaf) for leaf in _leaves(part.__dict__[name])]
                if any(state is not None for state in states):
                    yield f"{type(part).__name__}.{name}" + (f" of submodule {at}" if at else ""), states


def _leaves(value: object) -> list[Any]:
    return tree_leaves(value) if isinstance(value, list | tuple | dict) else [value]


def _state(value: object) -> Any:
    if isinstance(value, Tensor):
        return _sample(value) if has_values(value) else None
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    numpys = getattr(value, "bit_generator", None)
    return None if numpys is None else repr(numpys.state)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
