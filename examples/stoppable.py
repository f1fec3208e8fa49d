"""Ctrl-C while a script of this folder still imports, torch above all, which takes seconds: to import this is enough.

Until `status_of` begins the script's own work, it is one line and status 130; from then on a KeyboardInterrupt, as ever.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

Handler = Callable[[int, FrameType | None], object]

FOLDER = Path(__file__).resolve().parent


def stop(number: int, frame: FrameType | None) -> None:
    """End at once: there is nothing to save, and what is half imported cannot be trusted to end by itself."""
    print("\nstopped; nothing was begun", file=sys.stderr, flush=True)
    os._exit(128 + number)


def a_script_runs() -> bool:
    """Whether the program is one of this folder's scripts: tests and others, which import them, end in their own way."""
    program = getattr(sys.modules["__main__"], "__file__", None)
    return program is not None and FOLDER in Path(program).resolve().parents


def exchange(before: Handler, after: Handler) -> None:
    """Let `after` hear Ctrl-C where `before` did; only the main thread may."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is before:
        signal.signal(signal.SIGINT, after)


def begin() -> None:
    """From here on the script itself answers."""
    exchange(stop, signal.default_int_handler)


if a_script_runs():
    exchange(signal.default_int_handler, stop)
