"""What comes out of every stage, found by one forward in eval mode that leaves no trace."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

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
    """

    features: Tensor
    module: nn.Module | None
    weights: tuple[torch.Size, ...] = ()


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
    inlet: Tensor | None = None
    handed_on: object = batch
    alone: list[bool] = [False] * len(cuts)

    def on_inlet(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        alone[modules.index(module)] = len(args) == 1 and not kwargs and args[0] is handed_on

    def on_outlet(stage: int, output: object) -> object:
        nonlocal inlet, handed_on
        ran.append(stage)
        ends.append((output, inlet))
        if not isinstance(output, Tensor):
            return output
        inlet, handed_on = cut(output, differentiable=True)
        if inlet is not None:
            isolation.opens(len(ran), inlet)
        return handed_on

    quiet, before = undisturbed(backbone), attached(dict.fromkeys(modules, on_inlet), {})
    after = hooked(modules, on_outlet)
    try:
        with quiet, quiet, before, before, after, after, torch.enable_grad():
            backbone(batch)
    except Exception as error:
        raise ValueError(_failure(backbone, cuts, batch, error)) from error
    check_order(cuts, ran, backbone)
    outlets: list[Outlet] = []
    for stage, (output, begin) in enumerate(ends):
        segment = Segment(one_tensor(stage, cuts[stage], output), begin)
        isolation.claim_stage(stage, segment.weights)
        _check_kind(stage, cuts[stage], segment.outlet)
        check_rows(stage, cuts[stage], segment.outlet, len(batch), strict=True)
        weights = tuple(weight.shape for weight in segment.weights or backbone.parameters())
        outlets.append(Outlet(segment.outlet.detach(), modules[stage] if alone[stage] else None, weights))
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


def _failure(backbone: nn.Module, cuts: tuple[str, ...], batch: Tensor, error: Exception) -> str:
    """What to say of ``error``: whose fault it is shows in a forward without hooks."""
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
    if shape[0] == rows or (shape[0] % rows == 0 and shape[0] > 0 and not (strict and shape[1] == rows)):
        return
    raise ValueError(
        f"stage {stage} ends after {cut!r}, which returned shape {shape} for a batch of {rows}; the first axis of an outlet is "
        "the batch, whose views a unit tells apart by it. End the stage after a submodule that returns the batch first"
    )


def example_batch(backbone: nn.Module, example: Tensor | Sequence[Tensor] | None) -> Tensor:
    """``example``, views concatenated; by default two 224-pixel RGB images in the backbone's dtype and device."""
    if isinstance(example, Tensor):
        return example
    if example is not None:
        return torch.cat(list(example))
    weight = next((t for t in backbone.parameters() if t.is_floating_point()), torch.empty(0))
    return torch.zeros(2, 3, 224, 224, dtype=weight.dtype, device=weight.device)


def channel_axis(features: Tensor) -> int:
    """The axis that holds the channels of a feature map, as its shape tells.

    ======================================  ====  ==================================================
    shape                                   axis
    ======================================  ====  ==================================================
    ``(N, C)``                              1     vectors
    ``(N, T, C)``                           -1    tokens (a 1-d convolution's ``(N, C, L)`` looks the same)
    ``(N, S, S, C)`` with ``C != S``        -1    square maps with channels last, as in torchvision's Swin
    any other                               1     channels first
    ======================================  ====  ==================================================

    Where the shape misleads, :func:`agreed_axis` finds out.

    Example:
        >>> channel_axis(torch.zeros(2, 64, 56, 56)), channel_axis(torch.zeros(2, 56, 56, 96))
        (1, -1)
    """
    shape = features.shape
    if features.ndim == 3 or (features.ndim == 4 and shape[1] == shape[2] != shape[3]):
        return -1
    return 1


def agreed_axis(features: Tensor, weights: Iterable[torch.Size]) -> int:
    """The axis that :func:`channel_axis` tells, unless the stage's weights tell another.

    Raises:
        ValueError: if no weight has the size of that axis, but some weight puts out what the other candidate has.
    """
    at = channel_axis(features)
    shape, other = tuple(features.shape), -1 if at == 1 else 1
    square = at == 1 and features.ndim > 3 and len(set(shape[2:])) == 1  # maps with channels first, whatever their size
    sizes = [size for size in weights if len(size)]
    known = {size[0] for size in sizes} | {size[1] for size in sizes if len(size) > 1}
    if features.ndim > 2 and not square and shape[at] not in known and shape[other] in {size[0] for size in sizes}:
        raise ValueError(
            f"which axis of an outlet of shape {shape} holds the channels? Its shape tells axis {at}, of size {shape[at]}, but "
            f"the stage's weights have size {shape[other]}, that of axis {other}. Say channel_axis={other} (or {at}): "
            f"LocalWrapper(..., channel_axis={other})"
        )
    return at
