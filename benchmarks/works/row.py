"""One row of docs/works-with.md: a network is cut, stepped, and compared with plain autograd in double precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from time import process_time
from typing import Any

import torch
from torch import nn

from locallearn import LocalWrapper, Plan, stages_of
from locallearn.testing.comparison import ENTRIES, RTOL, problems, relative_errors
from locallearn.testing.copies import copied, gradients, replayed
from locallearn.testing.reference import prepared
from works.kinds import Network


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
        found["checkpoint"] = _recomputed(model, stages, views, network.options)
    found["ways"] = [
        {
            "text": way.text,
            "stages": list(way.stages),
            **compared(way.build().train(), way.stages, views, network.options),
        }
        for way in network.ways
    ]
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
    model: nn.Module, stages: Sequence[str], views: Sequence[Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The largest relative error of a gradient by each entry, or the refusal."""
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)  # for what a forward makes by itself
    try:
        wrapped = LocalWrapper(deepcopy(model), stages, example=views[0], **options)
        ready = prepared(wrapped, tuple(views), None)
        found: dict[str, Any] = {"errors": {}, "wrong": [], "dtype": str(ready.expected.dtype).removeprefix("torch.")}
        for entry, run in ENTRIES.items():
            with replayed():
                again = copied(ready.model)
                run(again, deepcopy(ready.views), None)
            found["errors"][entry] = max(relative_errors(gradients(again), ready.expected).values())
            found["wrong"] += [f"{entry}: {p}" for p in problems(again, ready.expected, RTOL[ready.expected.dtype])][:3]
    except (TypeError, ValueError, RuntimeError) as error:
        return {"refused": str(error)}
    finally:
        torch.set_default_dtype(torch.float32)
    return found


def _recomputed(
    model: nn.Module, stages: Sequence[str], views: Sequence[Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """By ``checkpoint=True``; where it finds nothing to recompute, by the class of the stages' last modules."""
    found = {"policy": "True", **compared(model, stages, views, {**options, "checkpoint": True})}
    if "refused" not in found:
        return found
    blocks = tuple({type(model.get_submodule(name)): None for name in stages})
    policy = blocks[0] if len(blocks) == 1 else blocks
    again = compared(model, stages, views, {**options, "checkpoint": policy})
    names = [block.__name__ for block in blocks]
    said = names[0] if len(names) == 1 else f"({', '.join(names)})"
    return {"policy": said, "instead": found["refused"], **again}
