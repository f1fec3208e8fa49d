"""Keeps torch.compile out of a function, whose frames it would look at one by one."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """This is just ``torch.compiler.disable``, whose import takes a second, from when there is a compiler at all.

    What was compiled by itself, as a decoder may be, runs compiled in it all the same.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        disable: Any = torch.compiler.disable
        result: R = disable(function)(*args, **kwargs)
        return result

    return call
