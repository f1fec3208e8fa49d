"""Ctrl-C and a scheduler's SIGTERM, heard between two steps instead of within one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Gives `asked()`: whether the run is to stop after this step. A second signal stops it at once."""
    stop = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal stop
        if stop:
            raise KeyboardInterrupt
        stop = True

    signals = [signal.SIGINT, signal.SIGTERM]
    if threading.current_thread() is not threading.main_thread():
        signals = []  # only the main thread may set handlers
    before = [signal.signal(number, ask) for number in signals]
    try:
        yield lambda: stop
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
