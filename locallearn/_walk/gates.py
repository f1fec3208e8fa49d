"""Calls of modules in which local passes take part while they run, whichever thread runs them and however many there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any, NamedTuple

from torch import nn

from locallearn._walk.undo import Reverted

_COMES_OR_GOES = RLock()  # threads may each run a pass over one backbone
_ABSENT = object()


class Guest(NamedTuple):
    """Whom a gate lets in.

    Attributes:
        module: whose calls are concerned.
        whole: the call as a whole, with all hooks of the module, or its ``forward`` alone. Of a module that went through
            ``module.compile()`` it is the call in either case, since hooks inside of compiled code are not asked.
        concerned: whether the call that is made now belongs to the guest's pass.
        handle: ``handle(original, *args, **kwargs)``, in place of ``original(*args, **kwargs)``.
    """

    module: nn.Module
    whole: bool
    concerned: Callable[[], bool]
    handle: Callable[..., Any]

    @property
    def name(self) -> str:
        """The attribute in which the module keeps what such a call runs."""
        return "_compiled_call_impl" if self.whole or is_compiled(self.module) else "forward"


class _Gate:
    """Stands where a module keeps what a call of it runs, and lets each pass in on its own calls only."""

    def __init__(self, original: Callable[..., Any], kept: object) -> None:
        self.original, self.kept = original, kept
        self.guests: tuple[Guest, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for guest in self.guests:
            if guest.concerned():
                return guest.handle(self.original, *args, **kwargs)
        return self.original(*args, **kwargs)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module`` went through ``module.compile()``."""
    called = module._compiled_call_impl
    return called is not None and not (isinstance(called, _Gate) and called.kept is _ABSENT)


def original(guest: Guest) -> Callable[..., Any]:
    """What a call runs that concerns nobody."""
    gate = guest.module.__dict__.get(guest.name)
    if isinstance(gate, _Gate):
        return gate.original
    called: Callable[..., Any] | None = getattr(guest.module, guest.name)
    return guest.module._call_impl if called is None else called


def welcomed(guests: Sequence[Guest]) -> Reverted[None]:
    """While open, ``guests`` take part in the calls of their modules."""
    names = [guest.name for guest in guests]

    def come() -> None:
        for guest, name in zip(guests, names, strict=True):
            attributes = guest.module.__dict__
            with _COMES_OR_GOES:
                if not isinstance(attributes.get(name), _Gate):
                    attributes[name] = _Gate(original(guest), attributes.get(name, _ABSENT))
                gate = attributes[name]
                gate.guests = (guest, *gate.guests)

    def go() -> None:
        for guest, name in zip(guests, names, strict=True):
            attributes = guest.module.__dict__
            with _COMES_OR_GOES:
                gate = attributes.get(name)
                if not isinstance(gate, _Gate):
                    continue
                gate.guests = tuple(other for other in gate.guests if other is not guest)
                if not gate.guests and gate.kept is _ABSENT:
                    attributes.pop(name, None)
                elif not gate.guests:
                    attributes[name] = gate.kept

    return Reverted(come, go)
