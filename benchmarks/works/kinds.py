"""What a row of docs/works-with.md is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from works.families import Family


class Way(NamedTuple):
    """Out of a refusal: what one does, to which network, cut where."""

    text: str
    build: Callable[[], nn.Module]
    stages: Sequence[str]
    options: Mapping[str, Any] = {}


class Network(NamedTuple):
    """A row. `make` returns a backbone and a function that draws a view of it; without stages a rule names them."""

    kind: str
    make: Callable[[], tuple[nn.Module, Callable[[], Any]]]
    stages: Sequence[str] | None = None
    ways: Sequence[Way] = ()
    options: Mapping[str, Any] = {}
    views: int = 2


def of(kind: str, family: Family, **options: Any) -> Network:
    return Network(kind, lambda: (family.build(), family.batch), family.stages, **options)
