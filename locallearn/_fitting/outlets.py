"""What comes out of every stage, found by one forward in eval mode that leaves no trace."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from locallearn._fitting.batches import rows, told
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
    """

    features: Tensor
    module: nn.Module | None
    weights: tuple[torch.Size, ...] = ()
    whole: Any = None


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
    ends: list[tuple[object, list[Tensor]]] = []  # what each stage returned, and its inlets
    inlets: list[Tensor] = []
    handed_on: object = batch
    alone: list[bool] = [False] * len(cuts)

    def on_inlet(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        alone[modules.index(module)] = len(args) == 1 and not kwargs and args[0] is handed_on

    def on_outlet(stage: int, output: object) -> object:
        nonlocal inlets, handed_on
        ran.append(stage)
        ends.append((output, inlets))
        inlets, handed_on = cut(output, differentiable=True)
        isolation.opens(len(ran), inlets)
        return handed_on

    quiet, before = undisturbed(backbone), attached(dict.fromkeys(modules, on_inlet), {})
    after = hooked(modules, on_outlet)
    try:
        with quiet, quiet, before, before, after, after, torch.enable_grad():
            called(backbone, batch)
    except Exception as error:
        raise ValueError(_failure(backbone, cuts, batch, error)) from error
    check_order(cuts, ran, backbone)
    outlets: list[Outlet] = []
    for stage, (output, begin) in enumerate(ends):
        segment = Segment(checked(stage, cuts[stage], output), begin)
        isolation.claim_stage(stage, segment.weights, segment.outlets)
        read = _read(stage, cuts[stage], output, features or Features())
        check_rows(stage, cuts[stage], read, rows(batch), strict=True)
        weights = tuple(weight.shape for weight in segment.weights or backbone.parameters())
        whole = None if read is output else cut(output, differentiable=False)[1]
        outlets.append(Outlet(read.detach(), modules[stage] if alone[stage] else None, weights, whole))
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


def _failure(backbone: nn.Module, cuts: tuple[str, ...], batch: Any, error: Exception) -> str:
    """What to say of ``error``: whose fault it is shows in a forward without hooks."""
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
    if (
        rows is None
        or shape[0] == rows
        or (shape[0] % rows == 0 and shape[0] > 0 and not (strict and shape[1] == rows))
    ):
        return
    raise ValueError(
        f"stage {stage} ends after {cut!r}, which returned shape {shape} for a batch of {rows}; the first axis of an outlet is "
        "the batch, whose views a unit tells apart by it. End the stage after a submodule that returns the batch first"
    )


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
