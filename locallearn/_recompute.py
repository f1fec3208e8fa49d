"""Parts of a stage that run a second time in its backward, so that only their inputs are kept in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import get_ident
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

Run: TypeAlias = tuple[str, ...]  # names of submodules, each of which takes the previous one's output and nothing else


@contextmanager
def recomputed(backbone: nn.Module, runs: Sequence[Run], concerned: Callable[[], bool]) -> Iterator[None]:
    """While open, a forward of ``backbone`` checkpoints each run of submodules as one function.

    This is just ``checkpoint(module, input, use_reentrant=False)`` for a run of one. The submodules' forwards are replaced
    and put back: nothing else of the backbone changes.

    Args:
        backbone: whose forward is concerned.
        runs: what is recomputed together.
        concerned: tells, when a submodule is called, whether the call is a part of the pass.
    """
    again: set[int] = set()  # threads in which something runs a second time
    with ExitStack() as undo:
        for run in reversed(runs):  # inner ones first, so that the outer ones find them replaced
            modules = [backbone.get_submodule(name) for name in run]
            undo.enter_context(_replaced(run, modules, again, lambda: concerned() or get_ident() in again))
        yield


def unhooked(backbone: nn.Module, runs: Sequence[Run]) -> list[Run]:
    """``runs`` without those of several submodules of which one has hooks, which would not see its own input."""

    def has_hooks(name: str) -> bool:
        module = backbone.get_submodule(name)
        return bool(module._forward_hooks or module._forward_pre_hooks)

    return [run for run in runs if len(run) == 1 or not any(map(has_hooks, run))]


@contextmanager
def _replaced(run: Run, modules: Sequence[nn.Module], again: set[int], concerned: Callable[[], bool]) -> Iterator[None]:
    """The first module runs them all and the others hand on what they are given."""
    places = [(module.__dict__, _called(module)) for module in modules]
    before = [attributes.get(name) for attributes, name in places]
    forwards = [getattr(module, name) for module, (_, name) in zip(modules, places, strict=True)]
    whole: Any = None

    def first(*args: Any, **kwargs: Any) -> Any:
        nonlocal whole
        if not (torch.is_grad_enabled() and concerned()):
            return forwards[0](*args, **kwargs)
        versions = [(t, t._version) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        result = checkpoint(partial(_Twice(modules, forwards, again), **kwargs), *args, use_reentrant=False)
        if any(tensor._version != version for tensor, version in versions):
            raise RuntimeError(
                f"{run[0]!r} changes its input in place, and cannot be recomputed from it. Build it with inplace=False, or "
                "leave it out of checkpoint="
            )
        whole = result if len(run) > 1 else None
        return result

    def later(at: int, *args: Any, **kwargs: Any) -> Any:
        nonlocal whole
        if whole is None or not concerned():
            return forwards[at](*args, **kwargs)
        if len(args) != 1 or kwargs or args[0] is not whole:
            raise RuntimeError(
                f"{run[at]!r} does not take the output of {run[at - 1]!r} as it is, though it did when the backbone was wrapped, "
                "so that the two cannot be recomputed together. Name what is to be recomputed: checkpoint=<a class of modules>"
            )
        if at == len(run) - 1:
            whole = None
        return args[0]

    try:
        for at, (attributes, name) in enumerate(places):
            attributes[name] = partial(later, at) if at else first
        yield
    finally:
        for (attributes, name), known in zip(places, before, strict=True):
            if known is None:
                del attributes[name]
            else:
                attributes[name] = known


def _called(module: nn.Module) -> str:
    """What ``module(...)`` runs in the end."""
    return "forward" if module._compiled_call_impl is None else "_compiled_call_impl"


class _Twice:
    """Modules one after the other, which may run again: then from the buffers that they had before, and on copies of them.

    So BatchNorm's running statistics are updated once, and what depends on a buffer that the forward changes (spectral
    normalisation) comes out the same. The buffers themselves are swapped, not written to: another graph may have saved them.
    """

    def __init__(self, modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]], again: set[int]) -> None:
        self._forwards = forwards
        self._again = again
        self._parts = [part for module in modules for part in module.modules()]
        self._changed: list[tuple[dict[str, Tensor | None], str, Tensor]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._changed is None:
            return self._first(*args, **kwargs)
        now = [buffers[name] for buffers, name, _ in self._changed]
        here, outermost = get_ident(), get_ident() not in self._again
        self._again.add(here)
        try:
            for buffers, name, before in self._changed:
                buffers[name] = before.clone()
            return self._run(*args, **kwargs)
        finally:
            for (buffers, name, _), tensor in zip(self._changed, now, strict=True):
                buffers[name] = tensor
            if outermost:
                self._again.discard(here)

    def _first(self, *args: Any, **kwargs: Any) -> Any:
        held = [
            (part, name, tensor, tensor._version, tensor.detach().clone())
            for part in self._parts
            for name, tensor in part._buffers.items()
            if tensor is not None
        ]
        result = self._run(*args, **kwargs)
        self._changed = [
            (part._buffers, name, before)
            for part, name, tensor, version, before in held
            if part._buffers[name] is not tensor
            or tensor._version != version
            or (part.training and tensor.is_floating_point())  # BatchNorm's statistics change without a new version
        ]
        return result

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        result = self._forwards[0](*args, **kwargs)
        for forward in self._forwards[1:]:
            result = forward(result)
        return result
