"""Tries whether a rank's part runs by itself, and lets go of the others'."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from locallearn._fitting.quiet import undisturbed
from locallearn._walk.trees import mapped, tensors
from locallearn.pipeline.owners import Reading
from locallearn.pipeline.part import Chain, OwnForward, chain
from locallearn.pipeline.share import Share
from locallearn.wrapper import LocalWrapper


def device_of(known: Reading, share: Share, batch: Any) -> torch.device:
    """Where a rank's inlet lies."""
    return tensors(known.outlets[share.lowest - 1] if share.lowest else batch)[0].device


def tried(
    model: LocalWrapper, share: Share, known: Reading, batch: Any, owners: dict[Tensor, tuple[int, ...]]
) -> Chain | OwnForward:
    """This rank's part, which puts out the same as the whole backbone did; the others' numbers are dropped."""
    inlet = known.outlets[share.lowest - 1] if share.lowest else batch
    expected = known.outlets[share.highest]
    top = share.highest == len(model.stages) - 1
    to_the_end = top and any(stages == (len(model.stages),) for t, stages in known.stages.items() if _is_buffer(t))
    _drop(model, {tensor for tensor, ranks in owners.items() if share.rank not in ranks})
    part = chain(model.backbone, model.stages, share, to_the_end=to_the_end)
    if part is not None:
        return part
    own = OwnForward(model.backbone, model.stages, share, device_of(known, share, batch), to_the_end=to_the_end)
    outcomes = []
    for inputs in (mapped(lambda t: t.to("meta"), batch), batch) if share.lowest else (batch,):
        outcome = _outcome(own, model, inlet, inputs, share.highest)
        if not isinstance(outcome, Exception) and _equal(outcome, expected):
            own.needs_inputs = share.lowest > 0 and inputs is batch
            return own
        outcomes.append(outcome)
    raise ValueError(
        f"{type(model.backbone).__name__} does not run by itself from the outlet of stage {share.lowest - 1} to that of stage "
        f"{share.highest}: {_told(outcomes[-1])}. What its stages need beside the outlet below and the batch has to pass the cut"
    )


def _outcome(part: OwnForward, model: LocalWrapper, inlet: Any, inputs: Any, highest: int) -> Any:
    results: list[Any] = []

    def on_outlet(stage: int, output: Any) -> Any:
        if stage == highest:
            results.append(output)
        return output

    quiet = undisturbed(model.backbone)
    try:
        with quiet, quiet, torch.no_grad():
            part.run(_copied(inputs), lambda: _copied(inlet), on_outlet)
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything
        return error
    return results[0]


def _copied(tree: Any) -> Any:
    return mapped(lambda tensor: tensor.detach().clone(), tree)


def _equal(one: Any, other: Any) -> bool:
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    return all(a.device == b.device and torch.equal(a, b) for a, b in pairs)


def _is_buffer(tensor: Tensor) -> bool:
    """Which may be changed by a forward; what lies behind the last cut runs for that alone."""
    return not isinstance(tensor, nn.Parameter)


def _told(outcome: Any) -> str:
    if isinstance(outcome, Exception):
        return f"{type(outcome).__name__}: {outcome}"
    if any(tensor.is_meta for tensor in tensors(outcome)):
        return "something else from below is needed"
    return "another outlet comes out than in the whole forward"


def _drop(model: nn.Module, tensors: set[Tensor]) -> None:
    """Puts ``tensors`` on the meta device, wherever the model has them."""
    empty: dict[Tensor, Tensor] = {}
    for held in _registries(model):
        for name, tensor in held.items():
            if tensor is not None and tensor in tensors:
                if tensor not in empty:
                    moved: Any = torch.empty_like(tensor, device="meta")
                    empty[tensor] = (
                        nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
                    )
                held[name] = empty[tensor]


def _registries(model: nn.Module) -> Iterator[dict[str, Any]]:
    for module in model.modules():
        yield module._parameters
        yield module._buffers
