"""What is changed for a while and put back whatever happens, an interrupt half-way in or out included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from torch import nn

T = TypeVar("T")


class Reverted(Generic[T]):
    """A context: ``do()`` on the way in, whose result it yields, and ``undo()`` on the way out.

    Ctrl-C may strike between any two steps. If it strikes in ``do``, ``undo`` runs, so it goes by what it finds and not by
    what ``do`` has got to; if it strikes in ``undo``, that runs again, so it may run twice. What no context can help is an
    interrupt at the very call of its exit. Where that matters, enter it twice: ``with change, change: ...``.

    Example:
        >>> lamp = {"on": False}
        >>> with Reverted(lambda: lamp.update(on=True), lambda: lamp.update(on=False)):
        ...     lamp["on"]
        True
        >>> lamp["on"]
        False
    """

    def __init__(self, do: Callable[[], T], undo: Callable[[], object]) -> None:
        self._do, self._undo = do, undo
        self._done: list[T] = []
        self._undone = False

    def __enter__(self) -> T:
        try:
            if not self._done:
                self._done.append(self._do())
            return self._done[0]
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self._once()
        finally:
            self._once()

    def _once(self) -> None:
        if not self._undone:
            self._undo()
            self._undone = True


def attached(
    before: Mapping[nn.Module, Callable[..., Any]], after: Mapping[nn.Module, Callable[..., Any]]
) -> Reverted[None]:
    """Forward hooks, ``before[module](module, args, kwargs)`` and ``after[module](module, args, output)``.

    They are found again by what they are, since a handle is lost if the interrupt comes before it is stored.
    """

    def attach() -> None:
        for module, hook in before.items():
            module.register_forward_pre_hook(hook, with_kwargs=True)
        for module, hook in after.items():
            module.register_forward_hook(hook)

    def detach() -> None:
        for module, ours in before.items():
            hooks: Any = module._forward_pre_hooks
            for number in [number for number, hook in hooks.items() if hook is ours]:
                module._forward_pre_hooks_with_kwargs.pop(number, None)
                hooks.pop(number, None)
        for module, ours in after.items():
            hooks = module._forward_hooks
            for number in [number for number, hook in hooks.items() if hook is ours]:
                hooks.pop(number, None)

    return Reverted(attach, detach)
