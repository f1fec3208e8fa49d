"""What a comparison runs on: deep copies, in double precision, from the same random numbers."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from locallearn.wrapper import LocalWrapper


def copied(model: LocalWrapper) -> LocalWrapper:
    """A deep copy, on which nothing has run yet."""
    try:
        copy = deepcopy(model)
    except Exception as error:
        raise RuntimeError(
            f"gradients are compared on deep copies, and this model cannot be copied: {str(error).strip()}. If it keeps a tensor "
            "with a graph in an attribute, detach it or check the model before its first step; what cannot be copied at all "
            "(a lock, a file, a process group) needs a __deepcopy__"
        ) from error
    copy.zero_grad(set_to_none=True)
    copy.losses = copy.penalty = None
    return copy


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every gradient by its parameter's name."""
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def exact(tensor: Tensor) -> bool:
    """Whether it holds whole numbers."""
    return not (tensor.is_floating_point() or tensor.is_complex())


def doubled(value: Any) -> Any:
    """In double precision, if it is a tensor of real or complex numbers."""
    if not isinstance(value, Tensor) or exact(value):
        return value
    return value.detach().to(torch.complex128 if value.is_complex() else torch.float64)


def double(model: LocalWrapper) -> LocalWrapper:
    """``model`` itself, as by ``model.double()``, and complex numbers too."""
    known: dict[int, tuple[Tensor, Tensor]] = {}  # one buffer under two names stays one

    def once(tensor: Tensor) -> Tensor:
        return known.setdefault(id(tensor), (doubled(tensor), tensor))[0]

    model._apply(once)  # type: ignore[no-untyped-call] # what `model.double()` calls
    return model


def under_autocast(view: Tensor) -> bool:
    """Whether autocast, which leaves double precision alone, is on where ``view`` lies."""
    kind = view.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


@contextmanager
def replayed() -> Iterator[None]:
    """What runs inside may take gradients, and draws the random numbers that the next one draws again."""
    kept: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
        (torch.get_rng_state, torch.set_rng_state),
        (random.getstate, random.setstate),
    ]
    for accelerator in (torch.cuda, torch.xpu):
        if accelerator.is_initialized():
            kept.append((accelerator.get_rng_state_all, accelerator.set_rng_state_all))
    if torch.backends.mps.is_available():
        kept.append((torch.mps.get_rng_state, torch.mps.set_rng_state))
    if (numpy := sys.modules.get("numpy")) is not None:
        kept.append((numpy.random.get_state, numpy.random.set_state))
    states = [get() for get, _ in kept]
    try:
        with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="local_step leaves this process's own gradients|fp16 autocast without"
            )
            yield
    finally:
        for (_, put), state in zip(kept, states, strict=True):
            put(state)
