"""Modules that run a second time, in a backward: from the state that they had before the first, and checked once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from locallearn._walk.sameness import OtherState, alike, has_values, samples
from locallearn._walk.segment import version
from locallearn._walk.undo import Reverted
from locallearn._walk.writes import Writes

# Of stand-ins: another thread may find one where it looks for the tensor itself.
_ORIGINALS: Any = WeakIdKeyDictionary()


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
        changed: the weights that their forward changes in place, of which else no copy would be kept.
    """

    same: bool = False
    changed: frozenset[Place] = frozenset()


class Replay:
    """Modules one after the other, which may run again: then from the state that they had before, and on copies of it.

    State is what is registered: buffers, frozen weights, and trained ones that the forward itself changes. So BatchNorm's
    running statistics are updated once, and what depends on a buffer that the forward changes (spectral normalisation)
    comes out the same. The tensors are swapped, not written to, since another graph may have saved them. Torch's default
    generators are left to ``torch.utils.checkpoint``; any other state would make the second run another one, and the first
    time it is told.

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
        self._versions: list[int] = []
        self._other_state: frozenset[str] | None = None  # other state that changed; None if this is not to be checked

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._before is None:
            return self._first(*args, **kwargs)
        # by an optimiser that did not wait for the end of the backward
        stepped = self._other_state is not None and self._trained() != self._versions
        as_before = self._as_before(self._before)
        with as_before, as_before:  # twice, see Reverted
            return self._second(stepped, args, kwargs)

    def _second(self, stepped: bool, args: Any, kwargs: Any) -> Any:
        if self._other_state is None:
            return self._run_again(*args, **kwargs)
        other_state = OtherState(self._parts)
        with Writes():  # as the first time: compiled code runs as it was written under such a mode
            result = self._run_again(*args, **kwargs)
        if not stepped:
            self._check(samples(result), self._other_state, other_state.changed())
        self._learnt.same = True
        return result

    def _first(self, *args: Any, **kwargs: Any) -> Any:
        other_state = OtherState(self._parts) if self._compares else None
        size = sum(leaf.nbytes for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        state = _Registered(self._parts, None if self._compares else self._learnt.changed, size)
        with state.watch():
            result = self._run(*args, **kwargs)
        self._before = state.changed()
        changed = {place for place in self._before if place.kind == "_parameters" and not state.expected(place)}
        if other_state is not None:
            self._learnt.changed |= changed
            self._results, self._other_state = samples(result), other_state.changed()
            self._versions = self._trained()
        elif new := changed - self._learnt.changed:
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

    def _trained(self) -> list[int]:
        """The versions of the trained weights."""
        weights = [weight for part in self._parts for weight in part._parameters.values() if weight is not None]
        return [version(weight) for weight in weights if weight.requires_grad]

    def _as_before(self, before: dict[Place, Tensor | None]) -> Reverted[None]:
        """The modules in the state that they had before the first run."""
        held = {place: getattr(self._parts[place.module], place.kind) for place in before}
        again = copies(tensor for tensor in before.values() if isinstance(tensor, Tensor))
        now = {place: _itself(held[place], place.name) for place in before}
        for place, tensor in before.items():
            if isinstance(tensor, Tensor) and isinstance(now[place], Tensor):
                _ORIGINALS[again[tensor]] = now[place]
        here = get_ident()
        outermost = here not in self._again

        def swap() -> None:
            self._again.add(here)
            for place, tensor in before.items():
                _put(held[place], place.name, again[tensor] if isinstance(tensor, Tensor) else tensor)

        def put_back() -> None:
            for place, tensor in now.items():
                _put(held[place], place.name, tensor)
            if outermost:
                self._again.discard(here)

        return Reverted(swap, put_back)

    def _run_again(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._run(*args, **kwargs)
        except Exception as error:
            if (
                type(error).__module__ == "torch.utils.checkpoint"
            ):  # how it stops what has recomputed all that is needed
                raise
            raise RuntimeError(
                f"{self._name!r} cannot be recomputed: its forward ran once, and does not run a second time from the same input "
                f"({type(error).__name__}: {error}). It depends on what outlives a forward, such as a cache of keys and values. "
                "Switch that off (use_cache=False), or leave the module out of checkpoint="
            ) from error

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        result = self._forwards[0](*args, **kwargs)
        for forward in self._forwards[1:]:
            result = forward(result)
        return result


_ABSENT: Any = object()


def _itself(held: dict[str, Any], name: str) -> Any:
    """What stands somewhere when nothing runs again."""
    tensor = held.get(name, _ABSENT)
    return _ORIGINALS.get(tensor, tensor) if isinstance(tensor, Tensor) else tensor


def _put(held: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        held.pop(name, None)
    else:
        held[name] = value


class _Registered:
    """Weights and buffers of some modules, from now on.

    Whether a tensor has changed cannot always be told (``tensor.data`` and BatchNorm leave no new version). So buffers count
    as changed whatever happens, and so do frozen weights, unless they are many: those of a large network with small adapters
    would take more memory than recomputing them saves.

    Args:
        parts: the modules.
        changing: the weights that are known to change in a forward. ``None`` where that is to be learnt: keeps copies of all
            weights, and tells changes by value and by what is written, too.
        size: of the modules' input; frozen weights of as much are not many.
    """

    def __init__(self, parts: Sequence[nn.Module], changing: frozenset[Place] | None, size: int) -> None:
        self._parts, self._changing = parts, changing
        self._was: dict[Place, Tensor | None] = dict(self._places())
        frozen = {
            t for place, t in self._was.items() if t is not None and place.kind == "_parameters" and not t.requires_grad
        }
        self._few = sum(weight.nbytes for weight in frozen) <= size
        self._writes = Writes()
        registered = dict.fromkeys(tensor for tensor in self._was.values() if tensor is not None)
        self._versions = {tensor: version(tensor) for tensor in registered}
        learns = changing is None
        self._memory = {t: t.untyped_storage().data_ptr() for t in registered if learns and has_values(t)}
        self._copies = copies(
            tensor for place, tensor in self._was.items() if tensor is not None and self._keeps(place, tensor)
        )

    def _keeps(self, place: Place, tensor: Tensor) -> bool:
        return self._changing is None or place in self._changing or self._suspect(place, tensor)

    def _suspect(self, place: Place, tensor: Tensor) -> bool:
        return place.kind == "_buffers" or (self._few and not tensor.requires_grad)

    def expected(self, place: Place) -> bool:
        """Whether a copy is kept in any case."""
        tensor = self._was.get(place)
        return tensor is None or self._suspect(place, tensor)

    def watch(self) -> AbstractContextManager[object]:
        """While open, notes what is written, where changes are to be learnt."""
        return nullcontext() if self._changing is not None else self._writes

    def _places(self) -> Iterator[tuple[Place, Tensor | None]]:
        for at, part in enumerate(self._parts):
            for kind in ("_parameters", "_buffers"):
                for name, tensor in part.__dict__[kind].items():
                    yield Place(at, kind, name), tensor

    def changed(self) -> dict[Place, Tensor | None]:
        """What has changed, or may have, as it was before, if a copy was kept."""
        now = dict(self._places())
        before = dict.fromkeys(now.keys() - self._was.keys(), _ABSENT)
        for place, tensor in self._was.items():
            if now.get(place, _ABSENT) is not tensor or (tensor is not None and self._written(place, tensor)):
                before[place] = tensor if tensor is None else self._copies.get(tensor, tensor)
        return before

    def _written(self, place: Place, tensor: Tensor) -> bool:
        if self._suspect(place, tensor) or version(tensor) != self._versions[tensor]:
            return True
        if self._changing is not None:
            return place in self._changing
        if not has_values(tensor):
            return False
        memory = tensor.untyped_storage().data_ptr()
        written = memory != self._memory[tensor] or memory in self._writes.memory
        return written or not torch.equal(tensor, self._copies[tensor])


def copies(tensors: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """Copies of tensors; those that share memory share the copy's."""
    unique = list(dict.fromkeys(tensors))
    memory = Counter(tensor.untyped_storage().data_ptr() for tensor in unique if has_values(tensor))
    moved: dict[int, UntypedStorage] = {}
    found: dict[Tensor, Tensor] = {}
    with torch.no_grad():
        for tensor in unique:
            at = tensor.untyped_storage().data_ptr() if has_values(tensor) else None
            if at is not None and memory[at] > 1:
                if at not in moved:
                    moved[at] = tensor.untyped_storage().clone()  # type: ignore[no-untyped-call]
                copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                copy.set_(moved[at], tensor.storage_offset(), tensor.shape, tensor.stride())
            else:
                copy = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                copy = copy.as_subclass(type(tensor))
                copy.__dict__.update(tensor.__dict__)
            found[tensor] = copy.requires_grad_(tensor.requires_grad)
    return found
