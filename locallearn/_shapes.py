"""What comes out of every stage, found by one forward in eval mode that leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from locallearn._cuts import check_order, hooked, one_tensor, submodules
from locallearn._isolation import Isolation
from locallearn._segment import Segment, cut


class Outlet(NamedTuple):
    """What a stage returned.

    Attributes:
        features: the tensor, detached.
        module: the stage itself if it is one module that takes one tensor, else ``None``.
    """

    features: Tensor
    module: nn.Module | None


def probe(backbone: nn.Module, cuts: tuple[str, ...], batch: Tensor) -> list[Outlet]:
    """Runs ``backbone`` on ``batch`` and checks that the stages follow each other and share nothing.

    Raises:
        TypeError: if an outlet is not one tensor.
        ValueError: if a stage never ran, ran twice or out of order, if something crosses a cut, or if the forward fails.
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

    handles = [module.register_forward_pre_hook(on_inlet, with_kwargs=True) for module in modules]
    try:
        with undisturbed(backbone), torch.enable_grad(), hooked(modules, on_outlet):
            backbone(batch)
    except Exception as error:
        raise ValueError(
            f"{type(backbone).__name__} does not run on a batch of shape {tuple(batch.shape)} and {batch.dtype} ({error}). "
            "Give a batch that it takes: LocalWrapper(..., example=batch)"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    check_order(cuts, ran, backbone)
    outlets: list[Outlet] = []
    for stage, (output, begin) in enumerate(ends):
        segment = Segment(one_tensor(stage, cuts[stage], output), begin)
        isolation.claim_stage(stage, segment.weights)
        outlets.append(Outlet(segment.outlet.detach(), modules[stage] if alone[stage] else None))
    return outlets


def spanned(backbone: nn.Module, cuts: tuple[str, ...], batch: Tensor) -> list[bool]:
    """For each stage, whether a ``torch.no_grad``, or the like, of the backbone is open where it ends."""
    modes: dict[bool, list[bool]] = {True: [], False: []}
    for enabled, found in modes.items():

        def note(stage: int, output: object, found: list[bool] = found) -> object:
            found.append(torch.is_grad_enabled())
            return output

        with undisturbed(backbone), torch.set_grad_enabled(enabled), hooked(submodules(backbone, cuts), note):
            backbone(batch)
    return [not (on and not off) for on, off in zip(modes[True], modes[False], strict=True)]


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

    Example:
        >>> channel_axis(torch.zeros(2, 64, 56, 56)), channel_axis(torch.zeros(2, 56, 56, 96))
        (1, -1)
    """
    shape = features.shape
    if features.ndim == 3 or (features.ndim == 4 and shape[1] == shape[2] != shape[3]):
        return -1
    return 1


@contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Runs what is inside in eval mode, then puts back every submodule's mode, buffers and the random state."""
    parts = [part for module in modules for part in module.modules()]
    modes = [part.training for part in parts]
    buffers = [dict(part._buffers) for part in parts]
    before = [(t, t._version, t.clone()) for held in buffers for t in held.values() if t is not None]
    gpus = {t.device.index for module in modules for t in module.parameters() if t.is_cuda}
    try:
        with torch.random.fork_rng(gpus if torch.cuda.is_available() else ()):
            for module in modules:
                module.eval()
            yield
    finally:
        for part, mode, held in zip(parts, modes, buffers, strict=True):
            part.training = mode
            part._buffers.update(held)
        with torch.no_grad():
            for buffer, version, value in before:
                if buffer._version != version:
                    buffer.copy_(value)
