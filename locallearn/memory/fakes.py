"""Tensors without numbers, for a step that is only counted; none of them outlives it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from types import FrameType, ModuleType
from typing import Any, TypeVar
from weakref import ref

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class Fakes(TorchDispatchMode):
    """To be entered: tensors that are made inside have no numbers, and are remembered, though not kept.

    It takes tensors with numbers for fakes too: constants, caches.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        modes = [tensor.fake_mode for tensor in model.parameters() if isinstance(tensor, FakeTensor)]
        self.mine = not modes
        self._mode = modes[0] if modes else FakeTensorMode(allow_non_fake_inputs=True)
        self._made: list[ref[Tensor]] = []

    def __enter__(self) -> Any:
        self._mode.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._mode.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._made += [ref(tensor) for tensor in tree_leaves(result) if isinstance(tensor, FakeTensor)]
        return result

    def copy(self, real: T) -> T:
        """A copy without numbers, which costs no memory and no computation."""
        with FakeCopyMode(self._mode):
            copied = deepcopy(real)
        if isinstance(copied, nn.Module):
            self._made += [ref(tensor) for tensor in (*copied.parameters(), *copied.buffers())]
        return copied

    def alive(self) -> list[Tensor]:
        """Those that somebody still keeps."""
        return [tensor for known in self._made if (tensor := known()) is not None]


@contextmanager
def analysed(model: nn.Module) -> Iterator[Fakes]:
    """Yields fakes for copies of ``model``, of which nothing may be left in the end.

    A forward may put tensors where copying the model does not reach: into a cache of a function, a class or a module. The
    model itself would find them there, and fail. They are taken out: caches of ``functools`` are emptied, entries of
    dictionaries deleted, which a cache takes for values that it does not have yet.

    Raises:
        RuntimeError: at the end, if one is left elsewhere. No variable of the caller may hold one.
    """
    fakes = Fakes(model)
    try:
        yield fakes
    finally:
        holder = _take_out(fakes) if fakes.mine and fakes.alive() else ""
    if holder:
        raise RuntimeError(
            f"a copy of {type(model).__name__} ran without numbers, and {holder} has kept a tensor from it, which the model "
            "itself would find there. Empty that before you use the model again, and count a real step instead: "
            "locallearn.memory.measure(lambda: model.local_step(...))"
        )


def _take_out(fakes: Fakes) -> str:
    """Empties what holds fakes, and returns the name of what it cannot empty: a module or class with one in an attribute."""
    gc.collect()
    for _ in range(2):  # what has been taken out of a cache may lie in another one
        for found in _holders(fakes.alive()):
            if type(found) is _CACHE:
                found.cache_clear()
            elif type(found) is dict and not _names(found):
                for key in [key for key, value in found.items() if isinstance(value, FakeTensor)]:
                    del found[key]
        gc.collect()
    for found in _holders(fakes.alive()):
        if isinstance(found, ModuleType) and not found.__name__.startswith("torch."):
            return f"the module {found.__name__!r}"
        if isinstance(found, type) and not found.__module__.startswith("torch."):
            return f"the class {found.__module__}.{found.__qualname__}"
    return ""


_CACHE: Any = type(lru_cache(lambda: None))


def _names(found: dict[Any, Any]) -> bool:
    """Whether it holds the attributes of something, which has no use for fewer."""
    return any(
        isinstance(owner, type) or getattr(owner, "__dict__", None) is found for owner in gc.get_referrers(found)
    )


def _holders(alive: list[Tensor]) -> Iterator[Any]:
    """What leads to them, in a few steps; what no attribute leads to, a graph that torch does not free, is in nobody's way."""
    level: list[object] = list(alive)
    seen = {id(level), id(alive)}
    for _ in range(6):
        seen |= {id(level), *map(id, level)}
        level = [found for found in gc.get_referrers(*level) if id(found) not in seen and type(found) is not FrameType]
        if not level:
            return
        yield from level
