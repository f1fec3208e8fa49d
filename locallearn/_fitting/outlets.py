"""What comes out of every stage, found by one forward in eval mode that leaves no trace."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from locallearn._fitting.channels import Channels
from locallearn._fitting.quiet import undisturbed
from locallearn._walk.cuts import check_order, hooked, one_tensor, submodules
from locallearn._walk.isolation import Isolation
from locallearn._walk.segment import Segment, cut
from locallearn._walk.undo import attached


class Outlet(NamedTuple):
    """What a stage returned.

    Attributes:
        features: the tensor, detached.
        module: the stage itself if it is one module that takes one tensor, else ``None``.
        weights: shapes of the stage's weights, of all the backbone's if none of them is trained.
        axis: of the channels, if a module says it.
    """

    features: Tensor
    module: nn.Module | None
    weights: tuple[torch.Size, ...] = ()
    axis: int | None = None


def probe(backbone: nn.Module, cuts: tuple[str, ...], batch: Tensor) -> list[Outlet]:
    """Runs ``backbone`` on ``batch`` and checks that the stages follow each other and share nothing.

    What ``backbone`` does to ``batch`` in place is done to it; all else is left as it was.

    Raises:
        TypeError: if an outlet is not one tensor, or one of integers.
        ValueError: if a stage never ran, ran twice or out of order, if something crosses a cut, if an outlet's first axis is
            not the batch's, or if the forward fails.
    """
    modules = submodules(backbone, cuts)
    isolation = Isolation(backbone, cuts)
    ran: list[int] = []
    ends: list[tuple[object, Tensor | None]] = []  # what each stage returned, and its inlet
    told: list[tuple[int, int]] = []  # numbers of what it returned and of what goes on
    inlet: Tensor | None = None
    handed_on: object = batch
    alone: list[bool] = [False] * len(cuts)
    channels = Channels(backbone)

    def on_inlet(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        alone[modules.index(module)] = len(args) == 1 and not kwargs and args[0] is handed_on

    def on_outlet(stage: int, output: object) -> object:
        nonlocal inlet, handed_on
        ran.append(stage)
        ends.append((output, inlet))
        if not isinstance(output, Tensor):
            told.append((-1, -1))
            return output
        inlet, handed_on = cut(output, differentiable=True)
        if inlet is not None:
            isolation.opens(len(ran), inlet)
        told.append((channels.number(output), channels.number(handed_on)))
        return handed_on

    quiet, before = undisturbed(backbone), attached(dict.fromkeys(modules, on_inlet), {})
    after, heard = hooked(modules, on_outlet), channels.heard()
    try:
        with quiet, quiet, heard, heard, before, before, after, after, torch.enable_grad():
            backbone(batch)
    except Exception as error:
        raise ValueError(failure(backbone, cuts, batch, error)) from error
    check_order(cuts, ran, backbone)
    outlets: list[Outlet] = []
    for stage, (output, begin) in enumerate(ends):
        segment = Segment(one_tensor(stage, cuts[stage], output), begin)
        isolation.claim_stage(stage, segment.weights)
        _check_kind(stage, cuts[stage], segment.outlet)
        check_rows(stage, cuts[stage], segment.outlet, len(batch), strict=True)
        weights = tuple(weight.shape for weight in segment.weights or backbone.parameters())
        axis = channels.axis(segment.outlet.shape, *told[stage])
        outlets.append(Outlet(segment.outlet.detach(), modules[stage] if alone[stage] else None, weights, axis))
    return outlets


def check_graph(backbone: nn.Module) -> None:
    """Checks that a forward of ``backbone`` can have a graph at all.

    Raises:
        RuntimeError: in inference mode.
        ValueError: if parameters were made there.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "the stages are found by the graph of a forward, and torch.inference_mode() builds none. Wrap outside of it; to "
            "evaluate, call the wrapped model in it"
        )
    if made := [name for name, weight in backbone.named_parameters() if not is_lazy(weight) and weight.is_inference()]:
        raise ValueError(
            f"{type(backbone).__name__} was made inside of torch.inference_mode(), so that its parameters {made[:3]} can never "
            "be trained. Build it outside"
        )


def failure(backbone: nn.Module, cuts: Sequence[str], batch: Tensor, error: Exception) -> str:
    """What to say of ``error`` in a forward with hooks: whose fault it is shows in a forward without hooks."""
    kind, given = type(backbone).__name__, f"a batch of shape {tuple(batch.shape)} and {batch.dtype}"
    told = f"{type(error).__name__}: {error}" if str(error) else f"{type(error).__name__} {_where(error)}"
    try:
        quiet = undisturbed(backbone)
        with quiet, quiet:
            backbone(batch.clone())
    except Exception:  # noqa: BLE001 - the user's code may raise anything
        return (
            f"{kind} does not run on {given} ({told}). If it takes another batch, give that: LocalWrapper(..., example=batch). "
            "If not, it fails without LocalWrapper too: model.eval()(batch)"
        )
    if not cuts:
        return (
            f"{kind} runs on {given}, but not while hooks watch its submodules ({told}). Name the stages: stages=[...]"
        )
    return (
        f"{kind} does not run on {given} if stages end after {list(cuts)}, though it runs without ({told}). Over a cut passes "
        "a tensor that is equal to the outlet, but another object without its graph; end the stages where that will do"
    )


def _where(error: Exception) -> str:
    """Where an exception without a text was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"in {frame.name}, line {frame.lineno} of {frame.filename}: {frame.line}"


def _check_kind(stage: int, cut: str, outlet: Tensor) -> None:
    if not (outlet.is_floating_point() or outlet.is_complex()):
        raise TypeError(
            f"stage {stage} ends after {cut!r}, which returned {outlet.dtype}; no gradient passes such a tensor. End the stage "
            "after a submodule that returns floating-point numbers"
        )


def check_rows(stage: int, cut: str, outlet: Tensor, rows: int, *, strict: bool = False) -> None:
    """Checks that the first axis of ``outlet`` is that of a batch of ``rows``, or a batch with an axis folded into it.

    Args:
        stage: for the message.
        cut: likewise.
        outlet: of the stage.
        rows: of the batch.
        strict: whether an outlet whose second axis is as long as the batch is taken for one with the batch second.

    Raises:
        ValueError: otherwise.
    """
    shape = tuple(outlet.shape)
    if len(shape) < 2:
        raise ValueError(
            f"stage {stage} ends after {cut!r}, which returned shape {shape}; a decoder reads (batch, channels, ...). End the "
            "stage after a submodule that returns so much"
        )
    if batch_first(shape, rows, strict=strict):
        return
    raise ValueError(
        f"stage {stage} ends after {cut!r}, which returned shape {shape} for a batch of {rows}; the first axis of an outlet is "
        "the batch, whose views a unit tells apart by it. End the stage after a submodule that returns the batch first"
    )


def batch_first(shape: Sequence[int], rows: int, *, strict: bool = True) -> bool:
    """Whether an outlet of that shape has channels, and the batch in front, or a batch with an axis folded into it."""
    if len(shape) < 2 or shape[0] == rows:
        return len(shape) > 1
    return shape[0] % rows == 0 and shape[0] > 0 and not (strict and shape[1] == rows)


def example_batch(backbone: nn.Module, example: Tensor | Sequence[Tensor] | None) -> Tensor:
    """``example``, views concatenated; by default two 224-pixel RGB images in the backbone's dtype and device."""
    if isinstance(example, Tensor):
        return example
    if example is not None:
        return torch.cat(list(example))
    weight = next((t for t in backbone.parameters() if t.is_floating_point()), torch.empty(0))
    return torch.zeros(2, 3, 224, 224, dtype=weight.dtype, device=weight.device)
