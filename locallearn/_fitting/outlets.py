"""What comes out of every stage, found by one forward in eval mode that leaves no trace."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from locallearn._fitting.batches import rows, told
from locallearn._fitting.channels import Channels
from locallearn._fitting.features import Features
from locallearn._fitting.quiet import undisturbed
from locallearn._walk.cuts import check_order, checked, hooked, submodules
from locallearn._walk.isolation import Isolation
from locallearn._walk.segment import Segment, cut
from locallearn._walk.trees import called, mapped
from locallearn._walk.undo import attached


class Outlet(NamedTuple):
    """What a stage returned.

    Attributes:
        features: the tensor that decoders read, detached.
        module: the stage itself if it is one module that takes the outlet below and nothing else, else ``None``.
        weights: shapes of the stage's weights, of all the backbone's if none of them is trained.
        whole: all that it returned, detached; ``None`` if that is ``features`` itself.
        axis: of the channels of ``features``, if a module says it.
    """

    features: Tensor
    module: nn.Module | None
    weights: tuple[torch.Size, ...] = ()
    whole: Any = None
    axis: int | None = None


def probe(backbone: nn.Module, cuts: tuple[str, ...], batch: Any, features: Features | None = None) -> list[Outlet]:
    """Runs ``backbone`` on ``batch`` and checks that the stages follow each other and share nothing.

    What ``backbone`` does to ``batch`` in place is done to it; all else is left as it was.

    Raises:
        TypeError: if no tensor of real or complex numbers is found in an outlet for a decoder.
        ValueError: if a stage never ran, ran twice or out of order, if something crosses a cut, if an outlet's first axis is
            not the batch's, or if the forward fails.
    """
    modules = submodules(backbone, cuts)
    isolation = Isolation(backbone, cuts)
    ran: list[int] = []
    ends: list[tuple[object, list[Tensor], object]] = []  # what each stage returned, its inlets, and what went on
    inlets: list[Tensor] = []
    handed_on: object = batch
    alone: list[bool] = [False] * len(cuts)
    channels = Channels(backbone)

    def on_inlet(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        alone[modules.index(module)] = len(args) == 1 and not kwargs and args[0] is handed_on

    def on_outlet(stage: int, output: object) -> object:
        nonlocal inlets, handed_on
        ran.append(stage)
        below = inlets
        inlets, handed_on = cut(output, differentiable=True)
        ends.append((output, below, handed_on))
        isolation.opens(len(ran), inlets)
        return handed_on

    quiet, before = undisturbed(backbone), attached(dict.fromkeys(modules, on_inlet), {})
    after, heard = hooked(modules, on_outlet), channels.heard()
    try:
        with quiet, quiet, heard, heard, before, before, after, after, torch.enable_grad():
            called(backbone, batch)
    except Exception as error:
        raise ValueError(failure(backbone, cuts, batch, error)) from error
    check_order(cuts, ran, backbone)
    outlets: list[Outlet] = []
    which = features or Features()
    for stage, (output, begin, on) in enumerate(ends):
        segment = Segment(checked(stage, cuts[stage], output), begin)
        isolation.claim_stage(stage, segment.weights, segment.outlets)
        read = _read(stage, cuts[stage], output, which)
        check_rows(stage, cuts[stage], read, rows(batch), strict=True)
        weights = tuple(weight.shape for weight in segment.weights or backbone.parameters())
        whole = None if read is output else cut(output, differentiable=False)[1]
        axis = channels.axis(read.shape, channels.number(read), channels.number(_read(stage, cuts[stage], on, which)))
        outlets.append(Outlet(read.detach(), modules[stage] if alone[stage] else None, weights, whole, axis))
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


def failure(backbone: nn.Module, cuts: Sequence[str], batch: Any, error: Exception) -> str:
    """What to say of ``error`` in a forward with hooks: whose fault it is shows in a forward without hooks."""
    kind, given = type(backbone).__name__, told(batch)
    what = f"{type(error).__name__}: {error}" if str(error) else f"{type(error).__name__} {_where(error)}"
    try:
        quiet = undisturbed(backbone)
        with quiet, quiet:
            called(backbone, mapped(torch.clone, batch))
    except Exception:  # noqa: BLE001 - the user's code may raise anything
        return (
            f"{kind} does not run on {given} ({what}). If it takes another batch, give that: LocalWrapper(..., example=batch). "
            "If not, it fails without LocalWrapper too: model.eval()(batch)"
        )
    if not cuts:
        return (
            f"{kind} runs on {given}, but not while hooks watch its submodules ({what}). Name the stages: stages=[...]"
        )
    return (
        f"{kind} does not run on {given} if stages end after {list(cuts)}, though it runs without ({what}). Over a cut passes "
        "a tensor that is equal to the outlet, but another object without its graph; end the stages where that will do"
    )


def _where(error: Exception) -> str:
    """Where an exception without a text was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"in {frame.name}, line {frame.lineno} of {frame.filename}: {frame.line}"


def _read(stage: int, cut: str, output: Any, features: Features) -> Tensor:
    try:
        read = features(output)
    except Exception as error:
        raise TypeError(f"stage {stage} ends after {cut!r}: {str(error) or type(error).__name__}") from error
    if not (read.is_floating_point() or read.is_complex()):
        raise TypeError(
            f"stage {stage} ends after {cut!r}, which returned {read.dtype}; no gradient passes such a tensor. End the stage "
            "after a submodule that returns floating-point numbers, or say which of several tensors is read (features=)"
        )
    return read


def check_rows(stage: int, cut: str, outlet: Tensor, rows: int | None, *, strict: bool = False) -> None:
    """Checks that the first axis of ``outlet`` is that of a batch of ``rows``, or a batch with an axis folded into it.

    Args:
        stage: for the message.
        cut: likewise.
        outlet: of the stage.
        rows: of the batch; ``None`` if its tensors do not agree, and only the number of axes is checked.
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


def batch_first(shape: Sequence[int], rows: int | None, *, strict: bool = True) -> bool:
    """Whether an outlet of that shape has channels, and the batch in front, or a batch with an axis folded into it."""
    if len(shape) < 2 or rows is None or shape[0] == rows:
        return len(shape) > 1
    return shape[0] % rows == 0 and shape[0] > 0 and not (strict and shape[1] == rows)
