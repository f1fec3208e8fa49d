"""Tensors without numbers, for an analysis that costs nothing; none of them may outlive it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from types import FrameType, ModuleType
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode


def fake_mode(model: nn.Module) -> FakeTensorMode:
    """The mode in which ``model`` lives, or a new one, which takes tensors with numbers for fakes too: constants, caches."""
    modes = [tensor.fake_mode for tensor in model.parameters() if isinstance(tensor, FakeTensor)]
    return modes[0] if modes else FakeTensorMode(allow_non_fake_inputs=True)


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """``model`` without its numbers, which costs no memory and no computation."""
    with FakeCopyMode(mode):
        return deepcopy(model)


@contextmanager
def analysed(model: nn.Module) -> Iterator[FakeTensorMode]:
    """Yields a mode for fake copies of ``model``, of which nothing may be left in the end.

    A forward may put tensors where copying the model does not reach: into a cache of a function, a class or a module. The
    model itself would find them there, and fail. Caches of ``functools`` are emptied, which changes nothing; else:

    Raises:
        RuntimeError: at the end, if a fake tensor is left. No variable of the caller may hold one.
    """
    mode = fake_mode(model)
    mine = not any(isinstance(tensor, FakeTensor) for tensor in model.parameters())
    try:
        yield mode
    finally:
        if mine:
            _empty_caches(mode)
    if mine and (holder := _holder(mode)):
        raise RuntimeError(
            f"the analysis of {type(model).__name__} ran a copy of it without numbers, and {holder} has kept a tensor from it, "
            "which the model itself would find there. Empty that cache before you use the model again, and name the stages "
            "yourself, for which nothing is analysed: stages=['...', ...]"
        )


def _is_fake(found: object, mode: FakeTensorMode) -> bool:
    return issubclass(type(found), FakeTensor) and getattr(found, "fake_mode", None) is mode


def _empty_caches(mode: FakeTensorMode) -> None:
    for found in gc.get_objects():
        if type(found) is _CACHE and any(_holds(inside, mode, 4) for inside in gc.get_referents(found)):
            found.cache_clear()


_CACHE: Any = type(lru_cache(lambda: None))


def _holds(found: object, mode: FakeTensorMode, depth: int) -> bool:
    if _is_fake(found, mode):
        return True
    if issubclass(type(found), nn.Module):
        return any(_is_fake(weight, mode) for weight in found.parameters())  # type: ignore[attr-defined]
    return (
        depth > 0
        and type(found) in (tuple, list, dict)
        and any(_holds(x, mode, depth - 1) for x in gc.get_referents(found))
    )


def _holder(mode: FakeTensorMode) -> str:
    """The module or class of the user's in whose attributes a fake tensor is left; nothing, if there is none.

    What no attribute leads to (a graph that torch does not free) is in nobody's way.
    """
    gc.collect()
    level: list[object] = [found for found in gc.get_objects() if _is_fake(found, mode)]
    seen = {id(level)}
    for _ in range(6):
        if not level:
            break
        seen |= {id(level), *map(id, level)}
        level = [found for found in gc.get_referrers(*level) if id(found) not in seen and type(found) is not FrameType]
        for found in level:
            if isinstance(found, ModuleType) and not found.__name__.startswith("torch."):
                return f"the module {found.__name__!r}"
            if isinstance(found, type) and not found.__module__.startswith("torch."):
                return f"the class {found.__module__}.{found.__qualname__}"
    return ""
