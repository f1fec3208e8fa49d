"""Builds every unit's decoder for the outlet it reads, and tries it there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
from einops import rearrange
from torch import Tensor, nn

from locallearn._fitting.channels import agreed_axis
from locallearn._fitting.features import Features, described
from locallearn._fitting.outlets import Outlet
from locallearn._fitting.quiet import undisturbed
from locallearn._walk.segment import cut, unchanged
from locallearn.decoders.fitting import fitting
from locallearn.plan import Plan
from locallearn.sharing import Sharing

Decoder: TypeAlias = Callable[[int], nn.Module] | Sequence[nn.Module] | Literal["auto"]


def attach(
    decoder: Decoder,
    plan: Plan,
    sharing: Sharing,
    outlets: Sequence[Outlet],
    axis: int | None,
    dtype: torch.dtype | None = None,
    read: Features | None = None,
) -> nn.ModuleList:
    """One module per unit, from the features of the unit's last stage to what its loss reads.

    One that begins with a private stage is a :class:`FromOutlet`, and takes the outlet as a whole.

    Args:
        decoder: makes a module from the outlet's width; or the modules themselves; or ``"auto"``, for
            :func:`locallearn.decoders.fitting.fitting`.
        plan: its units tell which outlet.
        sharing: may put a private stage in front.
        outlets: of every stage, for a small batch.
        axis: where the outlets have their channels, or ``None`` to go by what modules say, and else by their shape.
        dtype: of the decoders' weights; by default each has that of what it reads. For a complex outlet that is the real
            one, since the decoder makes it real, but weights that are complex stay so.
        read: takes the features out of what a private stage returns.

    Raises:
        TypeError: if ``decoder`` is or makes something else.
        ValueError: if there are too many or too few, if one does not run on its outlet, or if the shape of an outlet tells
            other channels than the stage's weights.
    """
    make = _maker(decoder, len(plan.units))
    stages = [outlet.module for outlet in outlets]
    attached = nn.ModuleList()
    fake: AbstractContextManager[object] = getattr(outlets[0].features, "fake_mode", nullcontext())
    for k, unit in enumerate(plan.units):
        features, parts = outlets[unit.last].features, list[nn.Module]()
        given = features
        if (private := sharing.private(unit, stages)) is not None:
            given = features if outlets[unit.last].whole is None else outlets[unit.last].whole
            quiet = undisturbed(private)
            with quiet, quiet, torch.no_grad():
                above = private(given)
                features = (read or Features())(above)
            parts += [private] if features is above else [private, _Read(read or Features())]
        told = outlets[unit.last if private is None else unit.last + 1]  # private is a copy of the next stage
        at = (told.axis or agreed_axis(features, told.weights)) if axis is None else axis
        if at == -1 and features.ndim > 3:
            parts.append(_ChannelsFirst())
        with fake:  # where the outlets have no numbers, the decoder has none
            parts.append(make(k, features.shape, at))
        _follow(parts[-1], features, dtype)
        whole = FromOutlet(*parts) if private is not None else parts[0] if len(parts) == 1 else nn.Sequential(*parts)
        _try(k, whole, given)
        attached.append(whole)
    return attached


class FromOutlet(nn.Sequential):
    """A decoder that takes all that a stage returned, as the next stage does."""


class _Read(nn.Module):
    """What of a private stage's outlet the rest of the decoder reads."""

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features

    def forward(self, outlet: Any) -> Tensor:
        return self.features(outlet)


def under_autocast(model: nn.Module, device: str) -> torch.dtype | None:
    """Under autocast an outlet's dtype does not tell that of weights."""
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return None
    return next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), None)


class _ChannelsFirst(nn.Module):
    """``Rearrange`` of ``einops.layers.torch``, whose import takes a second where torch is older than 2.8."""

    def forward(self, features: Tensor) -> Tensor:
        return rearrange(features, "n ... c -> n c ...")


def _maker(decoder: object, units: int) -> Callable[[int, Sequence[int], int], nn.Module]:
    """``make(unit, shape, axis)``, whichever way the user gave the decoders."""
    if isinstance(decoder, str) and decoder == "auto":
        return lambda k, shape, axis: fitting(shape, axis)
    if isinstance(decoder, nn.ModuleList | list | tuple):
        ready = list(decoder)
        if len(ready) != units:
            raise ValueError(f"decoder lists {len(ready)} modules for {units} units; it needs one per unit")
        if wrong := [type(module).__name__ for module in ready if not isinstance(module, nn.Module)]:
            raise TypeError(f"decoder is a list of modules, one per unit; it holds {wrong}")
        return lambda k, shape, axis: ready[k]
    if isinstance(decoder, nn.Module) or not callable(decoder):
        given = f"the module {type(decoder).__name__} itself" if isinstance(decoder, nn.Module) else repr(decoder)
        raise TypeError(
            "decoder is 'auto', a callable that makes a module from a width, such as decoder=ConvMLPDecoder, or a list of "
            f"modules, one per unit; got {given}"
        )

    def make(k: int, shape: Sequence[int], axis: int) -> nn.Module:
        width = shape[axis]
        module = decoder(width)
        if not isinstance(module, nn.Module):
            raise TypeError(f"decoder({width}) makes a module; it returned a {type(module).__name__}")
        return module

    return make


def _follow(decoder: nn.Module, features: Tensor, dtype: torch.dtype | None) -> None:
    real = dtype or features.dtype.to_real()

    def wanted(weight: Tensor) -> torch.dtype:
        if weight.is_complex():
            return real.to_complex()
        return real if weight.is_floating_point() else weight.dtype

    weights = [*decoder.parameters(), *decoder.buffers()]
    if any(weight.device != features.device or weight.dtype != wanted(weight) for weight in weights):
        if hasattr(features, "fake_mode"):  # such weights cannot be converted where they are
            for part in decoder.modules():
                for name, weight in part._parameters.items():
                    if weight is not None:
                        made = weight.detach().to(features.device, wanted(weight))
                        part._parameters[name] = nn.Parameter(made, weight.requires_grad)
                for name, buffer in part._buffers.items():
                    part._buffers[name] = None if buffer is None else buffer.to(features.device, wanted(buffer))
            return
        convert: Any = decoder._apply
        convert(lambda weight: weight.to(features.device, wanted(weight)))


def _try(k: int, decoder: nn.Module, outlet: Any) -> None:
    quiet = undisturbed(decoder)
    with quiet, quiet, torch.no_grad(), unchanged(outlet, f"the decoder of unit {k}"):
        try:
            decoder(cut(outlet, differentiable=False)[1])
        except Exception as error:
            complex_ = (
                ""
                if not (isinstance(outlet, Tensor) and outlet.is_complex())
                else (
                    ". The outlet is complex: begin the decoder with what makes it real, such as abs() or torch.view_as_real"
                )
            )
            raise ValueError(
                f"the decoder of unit {k} does not run on the outlet it reads, {_told(outlet)}: "
                f"{str(error) or type(error).__name__}{complex_}"
            ) from error


def _told(outlet: Any) -> str:
    return f"of shape {tuple(outlet.shape)}" if isinstance(outlet, Tensor) else described(outlet)
