"""Several processes at one grid: each takes runs that no other has, and what one leaves behind another may take up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def claimed(directory: Path) -> Iterator[bool]:
    """Whether `directory` is this process's until the end of the block; it is given back even if the process is killed."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "claim").open("w") as file:
        yield fcntl is None or _locked(file.fileno(), wait=False)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    with path.open("w") as file:
        if fcntl is not None:
            _locked(file.fileno(), wait=True)
        yield


def _locked(file: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
