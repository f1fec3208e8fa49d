"""One row of docs/works-with.md: a network is cut, stepped, and compared with plain autograd in double precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from time import process_time
from typing import Any, NamedTuple

import torch
from torch import nn

from locallearn import LocalWrapper, Plan, stages_of
from locallearn.testing.comparison import ENTRIES, RTOL, problems, relative_errors
from locallearn.testing.copies import copied, double, gradients, replayed
from locallearn.testing.reference import Prepared, prepared
from works.kinds import Network


class Known(NamedTuple):
    """A reference, and the random numbers that were drawn for it."""

    ready: Prepared
    state: torch.Tensor


def row(network: Network) -> dict[str, Any]:
    """All that the page tells of a network."""
    torch.manual_seed(0)
    model, batch = network.make()
    model.train()
    views = [batch() for _ in range(network.views)]
    found: dict[str, Any] = {"kind": network.kind, "auto": _automatic(model, views[0])}
    try:
        stages = list(network.stages or named(model, views[0], found["auto"]))
    except ValueError as error:
        found |= {"stages": [], "refused": str(error)}
    else:
        found |= {"stages": stages, **compared(model, stages, views, network.options)}
    if "errors" in found:
        found["checkpoint"] = _recomputed(model, stages, views, network.options, found.pop("known"))
    found["ways"] = []
    for way in network.ways:
        tried = compared(way.build().train(), way.stages, views, {**network.options, **way.options})
        tried.pop("known", None)
        found["ways"].append({"text": way.text, "stages": list(way.stages), **tried})
    return found


def _automatic(model: nn.Module, view: Any) -> dict[str, Any]:
    """What ``stages="auto"`` chooses, four stages or as many as there are, in which seconds of the CPU; or why not."""
    again, refused = deepcopy(model), ""
    for n in (4, 3, 2):
        start = process_time()
        try:
            wrapped = LocalWrapper(again, "auto", plan=Plan.windows(n, overlap=1), example=view)
        except Exception as error:  # noqa: BLE001 - whatever it is, the page tells it
            expected = isinstance(error, TypeError | ValueError)
            refused = refused or (str(error) if expected else f"{type(error).__name__}: {error}")
        else:
            return {"seconds": process_time() - start, "stages": list(wrapped.stages)}
    return {"refused": refused}


def named(model: nn.Module, view: Any, automatic: Mapping[str, Any]) -> Sequence[str]:
    """By rule: four stages, or as many as there are blocks for; else those of ``stages="auto"``."""
    for n in (4, 3, 2):
        try:
            return stages_of(model, n, view)
        except ValueError as error:
            last = error
    if "stages" in automatic:
        return list(automatic["stages"])
    raise last


def compared(
    model: nn.Module,
    stages: Sequence[str],
    views: Sequence[Any],
    options: Mapping[str, Any],
    known: Known | None = None,
) -> dict[str, Any]:
    """The largest relative error of a gradient by each entry, or the refusal.

    With ``known``, those of ``local_step`` alone beside a reference that is there already.
    """
    torch.manual_seed(1)
    try:
        wrapped = LocalWrapper(deepcopy(model), stages, example=views[0], **options)
        torch.set_default_dtype(torch.float64)  # for what a forward makes by itself
        if known is None:
            state = torch.get_rng_state()
            ready = prepared(wrapped, tuple(views), None)
            return {"known": Known(ready, state), **_errors(ready.model, ENTRIES, ready)}
        if not known.ready.why:
            wrapped = double(wrapped)
        wrapped.load_state_dict(known.ready.model.state_dict())
        torch.set_rng_state(known.state)
        return _errors(wrapped, {"local_step": ENTRIES["local_step"]}, known.ready)
    except (TypeError, ValueError, RuntimeError) as error:
        return {"refused": str(error)}
    finally:
        torch.set_default_dtype(torch.float32)


def _errors(model: LocalWrapper, entries: Mapping[str, Any], ready: Prepared) -> dict[str, Any]:
    errors, wrong = dict[str, float](), list[str]()
    for entry, run in entries.items():
        with replayed():
            again = copied(model)
            run(again, deepcopy(ready.views), None)
        errors[entry] = max(relative_errors(gradients(again), ready.expected).values())
        wrong += [f"{entry}: {told}" for told in problems(again, ready.expected, RTOL[ready.expected.dtype])][:3]
    return {"errors": errors, "wrong": wrong, "dtype": str(ready.expected.dtype).removeprefix("torch.")}


def _recomputed(
    model: nn.Module, stages: Sequence[str], views: Sequence[Any], options: Mapping[str, Any], known: Known
) -> dict[str, Any]:
    """By ``checkpoint=True``; where it finds nothing to recompute, by the classes of the stages' last modules."""
    found = {"policy": "True", **compared(model, stages, views, {**options, "checkpoint": True}, known)}
    if "refused" not in found:
        return found
    blocks = tuple({type(model.get_submodule(name)): None for name in stages})
    again = compared(model, stages, views, {**options, "checkpoint": blocks}, known)
    names = [block.__name__ for block in blocks]
    said = names[0] if len(names) == 1 else f"({', '.join(names)})"
    return {"policy": said, "instead": found["refused"], **again}
