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
