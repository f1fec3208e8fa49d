"""Mistakes on the command line: said in one line, with the nearest name that exists."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class CommandError(Exception):
    """What was given, what was expected and what to do."""


def nearest(given: str, known: Iterable[str]) -> str:
    """``"; did you mean 'resnet50'?"``, or nothing where no name is near."""
    names = list(known)
    near = get_close_matches(given, names, n=3, cutoff=0.6) or [name for name in names if given and given in name][:3]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def said(error: Exception) -> str:
    """What the library says of ``error``, in the command line's words, in one line."""
    text = " ".join(str(error).split())
    text, found, _ = text.partition(_ANOTHER)
    if found:
        text += f". {_CURE}"
    for python, option in _OPTIONS.items():
        text = text.replace(python, option)
    known = isinstance(error, CommandError | ValueError | ModuleNotFoundError | OSError)
    return text if known and text else f"{type(error).__name__}: {text}".rstrip(": ")


_ANOTHER = ". If it takes another batch"  # what follows is advice for Python
_CURE = "If it reads text, say --tokens 128, or as many as it takes; for other images, --size and --channels say which"
_OPTIONS = {
    "(example=)": "(--size)",
    "checkpoint=True": "--checkpoint",
    "decoder=": "--decoder",
    "Name the stages: stages=[...]": "Name the stages: check --at",
}
