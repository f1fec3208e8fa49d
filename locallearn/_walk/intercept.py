"""Calls of modules that local passes take over while they run, however many at once, and in whichever thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any, NamedTuple

from torch import nn

from locallearn._walk.undo import Reverted

_INSTALLING = RLock()  # threads may each run a pass over one backbone
_ABSENT = object()


class Interception(NamedTuple):
    """What runs in place of a module's calls.

    Attributes:
        module: whose calls are taken over.
        whole: the call as a whole, with all hooks of the module, or its ``forward`` alone. Of a module that went through
            ``module.compile()`` it is the call in either case, since hooks inside of compiled code do not run.
        concerned: tells whether the call that is made now is one of those.
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


class _Proxy:
    """Stands where a module keeps what a call of it runs, and asks who is concerned."""

    def __init__(self, original: Callable[..., Any], kept: object) -> None:
        self.original, self.kept = original, kept
        self.interceptions: tuple[Interception, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for interception in self.interceptions:
            if interception.concerned():
                return interception.handle(self.original, *args, **kwargs)
        return self.original(*args, **kwargs)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module`` went through ``module.compile()``."""
    called = module._compiled_call_impl
    return called is not None and not (isinstance(called, _Proxy) and called.kept is _ABSENT)


def original(interception: Interception) -> Callable[..., Any]:
    """What a call runs that is not taken over."""
    proxy = interception.module.__dict__.get(interception.name)
    if isinstance(proxy, _Proxy):
        return proxy.original
    called: Callable[..., Any] | None = getattr(interception.module, interception.name)
    return interception.module._call_impl if called is None else called


def intercepted(interceptions: Sequence[Interception]) -> Reverted[None]:
    """While open, calls of modules are taken over. The last one to leave a module puts back what was there."""
    names = [interception.name for interception in interceptions]

    def install() -> None:
        try:
            _INSTALLING.acquire()
            for interception, name in zip(interceptions, names, strict=True):
                attributes = interception.module.__dict__
                if not isinstance(attributes.get(name), _Proxy):
                    attributes[name] = _Proxy(original(interception), attributes.get(name, _ABSENT))
                proxy = attributes[name]
                proxy.interceptions = (interception, *proxy.interceptions)
        finally:
            _release()

    def remove() -> None:
        try:
            _INSTALLING.acquire()
            for interception, name in zip(interceptions, names, strict=True):
                attributes = interception.module.__dict__
                proxy = attributes.get(name)
                if not isinstance(proxy, _Proxy):
                    continue
                proxy.interceptions = tuple(other for other in proxy.interceptions if other is not interception)
                if not proxy.interceptions and proxy.kept is _ABSENT:
                    attributes.pop(name, None)
                elif not proxy.interceptions:
                    attributes[name] = proxy.kept
        finally:
            _release()

    return Reverted(install, remove)


def _release() -> None:
    """Lets other threads go on: however often this one has acquired the lock, if an interrupt kept it from releasing it."""
    while _INSTALLING._is_owned():  # type: ignore[attr-defined]
        _INSTALLING.release()
