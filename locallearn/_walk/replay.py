"""Modules that run a second time, in a backward: from the state that they had before the first, and checked once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from threading import RLock, get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from locallearn._walk.sameness import OtherState, alike, has_values, samples
from locallearn._walk.segment import version

_SWAPPING = RLock()  # or one thread would put back another's stand-ins


class Place(NamedTuple):
    """Where a tensor is registered: in which of the modules, as a weight or as a buffer, under which name."""

    module: int
    kind: str  # "_parameters" or "_buffers"
    name: str


@dataclass
class Learnt:
    """What a wrapper knows about modules that it recomputes.

    Attributes:
        same: a second run was compared with its first one, and had done the same.
        changed: the weights and buffers that their forward changes.
    """

    same: bool = False
    changed: frozenset[Place] = frozenset()


class Replay:
    """Modules one after the other, which may run again: then from the state that they had before, and on copies of it.

    State is what is registered: buffers, and weights that the forward itself changes. So BatchNorm's running statistics are
    updated once, and what depends on a buffer that the forward changes (spectral normalisation) comes out the same. The
    tensors are swapped, not written to, since another graph may have saved them. Torch's default generators are left to
    ``torch.utils.checkpoint``; any other state would make the second run another one, and the first time it is told.

    Args:
        name: of the first module, for messages.
        modules: what runs.
        forwards: how.
        again: gathers the threads in which something runs a second time.
        learnt: about these modules; what is found is added.
        compares: whether the second run is compared with the first.
    """

    def __init__(
        self,
        name: str,
        modules: Sequence[nn.Module],
        forwards: Sequence[Callable[..., Any]],
        again: set[int],
        learnt: Learnt,
        *,
        compares: bool,
    ) -> None:
        self._name, self._forwards, self._again, self._learnt = name, forwards, again, learnt
        self._compares = compares
        self._parts = list(dict.fromkeys(part for module in modules for part in module.modules()))
        self._before: dict[Place, Tensor | None] | None = None  # what changed, as it was
        self._results: list[Tensor] = []
        self._other_state: frozenset[str] | None = None  # other state that changed; None if this is not to be checked

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._before is None:
            return self._first(*args, **kwargs)
        with self._as_before(self._before):
            if self._other_state is None:
                return self._run(*args, **kwargs)
            other_state = OtherState(self._parts)
            result = self._run(*args, **kwargs)
            self._check(samples(result), self._other_state, other_state.changed())
        return result

    def _first(self, *args: Any, **kwargs: Any) -> Any:
        other_state = OtherState(self._parts) if self._compares else None
        state = _Registered(self._parts, None if self._compares else self._learnt.changed)
        result = self._run(*args, **kwargs)
        self._before = state.changed()
        if other_state is not None:
            self._learnt.changed |= self._before.keys()
            self._results, self._other_state = samples(result), other_state.changed()
        elif new := [place for place in self._before.keys() - self._learnt.changed if place.kind == "_parameters"]:
            names = sorted(f"{type(self._parts[place.module]).__name__}.{place.name}" for place in new)
            raise RuntimeError(
                f"{self._name!r} changes its weights {names} in place, which it did not do when it was recomputed for the "
                "first time, so that nothing was kept of them. Wrap the backbone again, or leave this out of checkpoint="
            )
        return result

    def _check(self, results: Sequence[Tensor], first: frozenset[str], second: frozenset[str]) -> None:
        same = alike(self._results, results)
        causes = first & second if same else first | second  # a cache that is filled once does no harm
        if causes or not same:
            raise RuntimeError(
                f"{self._name!r} cannot be recomputed: its forward runs a second time from the same input, and "
                f"{'it depends on' if same else 'computes something else. It depends on'} state that is not kept for that: "
                f"{', '.join(sorted(causes)) or 'none that can be seen from outside'}. Keep state in buffers, draw random "
                "numbers from torch's default generator, or leave the module out of checkpoint="
            )
        self._learnt.same = True

    @contextmanager
    def _as_before(self, before: dict[Place, Tensor | None]) -> Iterator[None]:
        held = {place: getattr(self._parts[place.module], place.kind) for place in before}
        here = get_ident()
        outermost = here not in self._again
        with _SWAPPING if before else nullcontext():
            copies = {t: _copy(t) for t in before.values() if isinstance(t, Tensor)}
            now = {place: held[place].get(place.name, _ABSENT) for place in before}
            try:
                self._again.add(here)
                for place, tensor in before.items():
                    _put(held[place], place.name, copies[tensor] if isinstance(tensor, Tensor) else tensor)
                yield
            finally:
                for place, tensor in now.items():
                    _put(held[place], place.name, tensor)
                if outermost:
                    self._again.discard(here)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        result = self._forwards[0](*args, **kwargs)
        for forward in self._forwards[1:]:
            result = forward(result)
        return result


_ABSENT: Any = object()


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _put(held: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        held.pop(name, None)
    else:
        held[name] = value


class _Registered:
    """Weights and buffers of some modules, from now on.

    Args:
        parts: the modules.
        changing: what is known to change in a forward. Of that a copy is kept, as of every buffer. ``None`` where that is to
            be learnt: keeps copies of all, and tells changes by value, too.
    """

    def __init__(self, parts: Sequence[nn.Module], changing: frozenset[Place] | None) -> None:
        self._parts, self._changing = parts, changing
        self._was: dict[Place, Tensor | None] = {}
        self._versions: dict[Tensor, int] = {}
        self._copies: dict[Tensor, Tensor] = {}
        for place, tensor in self._places():
            self._was[place] = tensor
            if tensor is None or tensor in self._copies:
                continue
            self._versions[tensor] = version(tensor)
            if changing is None or place.kind == "_buffers" or place in changing:
                self._copies[tensor] = _copy(tensor)

    def _places(self) -> Iterator[tuple[Place, Tensor | None]]:
        for at, part in enumerate(self._parts):
            for kind in ("_parameters", "_buffers"):
                for name, tensor in part.__dict__[kind].items():
                    yield Place(at, kind, name), tensor

    def changed(self) -> dict[Place, Tensor | None]:
        """What has changed, as it was before, if a copy was kept."""
        now = dict(self._places())
        before = dict.fromkeys(now.keys() - self._was.keys(), _ABSENT)
        for place, tensor in self._was.items():
            if now.get(place, _ABSENT) is not tensor or (tensor is not None and self._written(place, tensor)):
                before[place] = tensor if tensor is None else self._copies.get(tensor, tensor)
        return before

    def _written(self, place: Place, tensor: Tensor) -> bool:
        if version(tensor) != self._versions[tensor]:
            return True
        if place.kind == "_buffers" and self._parts[place.module].training and tensor.is_floating_point():
            return True  # BatchNorm's statistics change without a new version
        if self._changing is None:
            return has_values(tensor) and not torch.equal(tensor, self._copies[tensor])
        return place in self._changing
