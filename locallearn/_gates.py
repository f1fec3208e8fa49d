"""Calls of a module in which local passes take part while they run, whichever thread runs them and however many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any, NamedTuple, TypeAlias

from torch import nn

Handler: TypeAlias = Callable[..., Any]  # handler(original, *args, **kwargs), in place of original(*args, **kwargs)

_COMES_OR_GOES = RLock()  # threads may each run a pass over one backbone
_ABSENT = object()


class _Guest(NamedTuple):
    concerned: Callable[[], bool]
    handle: Handler


class Gate:
    """Stands where a module keeps what a call of it runs, and lets each pass in on its own calls only.

    Attributes:
        original: what stood there.
    """

    def __init__(self, original: Callable[..., Any], kept: object) -> None:
        self.original = original
        self.kept = kept
        self.guests: tuple[_Guest, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for guest in self.guests:
            if guest.concerned():
                return guest.handle(self.original, *args, **kwargs)
        return self.original(*args, **kwargs)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module`` went through ``module.compile()``."""
    called = module._compiled_call_impl
    return called is not None and not (isinstance(called, Gate) and called.kept is _ABSENT)


@contextmanager
def computing(module: nn.Module, concerned: Callable[[], bool], handle: Handler) -> Iterator[Gate]:
    """While open, ``handle`` runs in place of the module's ``forward``, inside of its hooks.

    Of a compiled module it is the compiled code with all hooks in it, since those inside of compiled code are not asked.
    """
    with _gated(module, "_compiled_call_impl" if is_compiled(module) else "forward", concerned, handle) as gate:
        yield gate


@contextmanager
def calling(module: nn.Module, concerned: Callable[[], bool], handle: Handler) -> Iterator[Gate]:
    """While open, ``handle`` runs in place of ``module(...)`` as a whole, with all of its hooks."""
    with _gated(module, "_compiled_call_impl", concerned, handle) as gate:
        yield gate


@contextmanager
def _gated(module: nn.Module, name: str, concerned: Callable[[], bool], handle: Handler) -> Iterator[Gate]:
    guest, attributes = _Guest(concerned, handle), module.__dict__
    try:
        with _COMES_OR_GOES:
            gate = attributes.get(name)
            if not isinstance(gate, Gate):
                original = getattr(module, name)
                gate = Gate(module._call_impl if original is None else original, attributes.get(name, _ABSENT))
                attributes[name] = gate
            gate.guests = (guest, *gate.guests)
        yield gate
    finally:
        with _COMES_OR_GOES:
            gate = attributes.get(name)
            if isinstance(gate, Gate):
                gate.guests = tuple(other for other in gate.guests if other is not guest)
                if not gate.guests and gate.kept is _ABSENT:
                    del attributes[name]
                elif not gate.guests:
                    attributes[name] = gate.kept
