"""Whether what a wrapper gives is what the reference gives, and if not, where."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from locallearn._fitting.batches import View
from locallearn._walk.trees import mapped
from locallearn.testing.copies import copied, exact, gradients, replayed
from locallearn.testing.reference import LocalGradients, prepared
from locallearn.wrapper import LocalWrapper

RTOL = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
_MOST = 20  # problems that one message lists


def assert_local_gradients(model: LocalWrapper, *views: View, targets: Any = None, rtol: float | None = None) -> None:
    """Asserts that ``local_step``, and ``loss = model(*views); loss.backward()``, give what :func:`local_gradients` does.

    Losses, the gradient of every parameter, and buffers are compared: the difference's norm relative to the expected one's,
    or to a small part of the largest one's where that is more. All three run on deep copies, from the same random state
    and in the same precision, so ``model`` stays as it was. What copies do not have (hooks of weights) is not looked at, nor
    are buffers that a ``torch.utils.checkpoint`` of your own updates again in the backward.

    Args:
        model: as for :func:`local_gradients`.
        views: as for :func:`local_gradients`.
        targets: as for :func:`local_gradients`.
        rtol: the largest relative error. By default, by the coarsest dtype in which anything was computed: 1e-8
            (float64), 1e-3 (float32), 0.05 (float16) or 0.2 (bfloat16).

    Raises:
        AssertionError: with the parameters, losses and buffers that differ: both norms, the relative error, the stage it
            belongs to and the units that train it.
        ValueError: if no unit trains anything, or ``rtol`` is not positive; and as :func:`local_gradients`.

    Example:
        >>> from torch import nn
        >>> from locallearn import LocalWrapper, MLPDecoder
        >>> from locallearn.testing import assert_local_gradients
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 8))
        >>> model = LocalWrapper(net, [1, 2, 3], decoder=MLPDecoder, example=torch.rand(2, 4))
        >>> assert_local_gradients(model, torch.rand(5, 4), torch.rand(5, 4))
    """
    if rtol is not None and not rtol > 0:
        raise ValueError(f"rtol is the largest relative error, more than 0; got {rtol}")
    ready = prepared(model, views, targets)
    expected = ready.expected
    if not expected.gradients:
        raise ValueError(
            "there is nothing to compare: no unit trains any weight. Are all of them frozen, or does the backbone or the loss "
            "run without gradients?"
        )
    rtol = RTOL.get(expected.dtype, 2e-1) if rtol is None else rtol
    wrong: list[str] = []
    for entry, run in ENTRIES.items():
        with replayed():
            again = copied(ready.model)
            run(again, [mapped(lambda tensor: tensor.detach().clone(), view) for view in ready.views], ready.targets)
        found = list(problems(again, expected, rtol))
        more = [f"and {len(found) - _MOST} more"] if len(found) > _MOST else []
        wrong += [f"{entry}: {problem}" for problem in [*found[:_MOST], *more]]
    if wrong:
        lines = "".join(f"\n  {problem}" for problem in wrong)
        raise AssertionError(
            f"not the gradients of one plain backward per unit (rtol={rtol:g}, computed in {expected.dtype}{ready.why}):{lines}"
        )


def _step(model: LocalWrapper, views: Sequence[View], targets: Any) -> None:
    model.local_step(*views, targets=targets)


def _call(model: LocalWrapper, views: Sequence[View], targets: Any) -> None:
    loss = model(*views, targets=targets)
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward()


ENTRIES = {"local_step": _step, "loss.backward()": _call}


def problems(ours: LocalWrapper, expected: LocalGradients, rtol: float) -> Iterator[str]:
    """What differs between ``ours``, after a pass, and what is expected: losses, gradients, buffers; a line for each."""
    floor = min(0.1, max(1e-6, 64 * torch.finfo(expected.dtype).eps / rtol))
    assert ours.losses is not None
    yield from differences(_terms(ours.losses, ours.penalty), _terms(*expected[:2]), rtol, floor).values()
    for name, problem in differences(gradients(ours), expected.gradients, rtol, floor).items():
        stage, units = expected.stages.get(name), expected.trained_by.get(name, ())
        of = "" if stage is None else f"of stage {stage} ({ours.stages[stage]!r}), "
        by = f"units {', '.join(map(str, units))}" if len(units) > 1 else f"unit {units[0]}" if units else "no unit"
        yield f"{problem} ({of}trained by {by})"
    buffers = {name: buffer for name, buffer in ours.named_buffers() if name in expected.buffers}
    for problem in differences(buffers, expected.buffers, rtol, floor).values():
        yield f"buffer {problem}"


def _terms(losses: Tensor, penalty: Tensor | None) -> dict[str, Tensor]:
    return {f"loss {k}": loss for k, loss in enumerate(losses)} | ({} if penalty is None else {"penalty": penalty})


def differences(
    ours: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float, floor: float = 1e-6
) -> dict[str, str]:
    """What is wrong with each tensor, by name: a difference relative to its norm, or to ``floor`` of the largest one's.

    A tensor of zeros may as well be missing.
    """
    norms = {name: _norm(tensor) for name, tensor in expected.items()}
    largest = max((norms[n] for n, t in expected.items() if not exact(t) and math.isfinite(norms[n])), default=0.0)
    least = floor * largest or 1.0  # all are zero where every ReLU is dead
    wrong: dict[str, str] = {}
    for name in [*expected, *(name for name in ours if name not in expected)]:
        if name not in ours:
            if norms[name] != 0:
                wrong[name] = f"{name} is missing; expected a norm of {norms[name]:.4g}"
        elif name not in expected:
            if (extra := _norm(ours[name])) != 0:
                wrong[name] = f"{name} has a norm of {extra:.4g}; expected none"
        else:
            error = _norm(_wide(ours[name]) - _wide(expected[name])) / max(norms[name], least)
            if not error <= (0 if exact(expected[name]) else rtol):
                size = _norm(ours[name])
                wrong[name] = f"{name} has norm {size:.4g}, expected {norms[name]:.4g}: relative error {error:.2g}"
    return wrong


def _wide(tensor: Tensor) -> Tensor:
    dense = tensor.detach().to_dense().cpu()
    return dense.to(torch.complex128 if dense.is_complex() else torch.float64)


def _norm(tensor: Tensor) -> float:
    return float(_wide(tensor).norm())
