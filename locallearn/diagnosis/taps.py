"""Hooks on decoders and losses that copies and pickles of a model do not carry on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Tap:
    """A hook that stays with the module it was put on: a copy of the module has one that does nothing."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __deepcopy__(self, memo: object) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return _left_behind, ()


def _nothing(*_: object) -> None:
    pass


def _left_behind() -> Callable[..., None]:
    return _nothing


def after(decoder: nn.Module, tap: Tap) -> Callable[[], object]:
    """Calls ``tap(output)`` after each call of ``decoder``; returns what ends that."""
    compiled: Any = getattr(decoder, "_compiled_call_impl", None)
    if compiled is None:
        return decoder.register_forward_hook(_Outputs(tap)).remove

    def call(*args: Any, **kwargs: Any) -> Any:  # hooks inside of compiled code may not run
        output = compiled(*args, **kwargs)
        tap(output)
        return output

    holder: Any = decoder
    holder._compiled_call_impl = call
    return lambda: setattr(holder, "_compiled_call_impl", compiled)


class _Outputs(Tap):
    """A forward hook that hands the output on."""

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        self._call(output)
