"""The memory of a local step, predicted and counted, as a table and as a picture beside end-to-end training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from locallearn._fitting.batches import View, concatenated, plain_views
from locallearn._fitting.chain import Link
from locallearn._walk.trees import mapped, tensors
from locallearn.memory.count import Flops, LiveBytes
from locallearn.memory.fakes import analysed
from locallearn.memory.pieces import weigh
from locallearn.memory.predict import predict
from locallearn.plan import Plan, Unit
from locallearn.schedules import Train
from locallearn.schedules.actions import Execution
from locallearn.sharing import Hard
from locallearn.wrapper import LocalWrapper


@dataclass(frozen=True)
class Timeline:
    """Live bytes over a step.

    Attributes:
        flops: how much was computed at each change of the bytes.
        live: the bytes from there on.
        units: at which of them each unit's training begins.
    """

    flops: tuple[int, ...]
    live: tuple[int, ...]
    units: dict[int, int]


@dataclass(frozen=True)
class MemoryReport:
    """What :func:`memory_report` has found; ``print`` it, or ``save`` it as a picture.

    Attributes:
        names: of the rows: the forward up to the first unit, then each unit with the forward above it.
        predicted: the peak in each row, in bytes, put together from what each stage and decoder takes by itself.
        counted: the peak in each row of a whole step.
        local: the whole step.
        end_to_end: a step of one unit that reaches as far, with its decoder.
    """

    names: tuple[str, ...]
    predicted: tuple[float, ...]
    counted: tuple[int, ...]
    local: Timeline
    end_to_end: Timeline

    def __str__(self) -> str:
        lines = [f"{'peak, MB':28} {'predicted':>10} {'counted':>10} {'':>8}"]
        rows = [*zip(self.names, self.predicted, self.counted, strict=True)]
        rows.append(("the step", max(self.predicted), max(self.counted)))
        for name, predicted, counted in rows:
            off = predicted / counted - 1
            lines.append(f"{name:28} {predicted / 1e6:>10,.1f} {counted / 1e6:>10,.1f} {off:>+8.1%}")
        whole = max(self.end_to_end.live)
        lines.append(f"{'end-to-end':28} {'':>10} {whole / 1e6:>10,.1f} {whole / max(self.counted):>7.2f}x")
        return "\n".join(lines)

    def save(self, path: str | PathLike[str]) -> None:
        """Draws live bytes over what is computed, with the units marked and end-to-end training beside it.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        try:
            from matplotlib.figure import Figure  # noqa: PLC0415 - only who wants a picture needs it
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "MemoryReport.save draws with matplotlib, which is not installed: pip install matplotlib"
            ) from error
        figure = Figure(figsize=(9, 4), layout="constrained")
        axes = figure.subplots()
        for name, timeline, colour in (("end-to-end", self.end_to_end, "0.6"), ("local", self.local, "C0")):
            over, live = [f / 1e9 for f in timeline.flops], [size / 1e6 for size in timeline.live]
            peak = max(live)
            axes.fill_between(over, live, step="post", color=colour, alpha=0.35, linewidth=0)
            axes.step(over, live, where="post", color=colour, linewidth=1, label=f"{name}: peak {peak:,.0f} MB")
            axes.axhline(peak, color=colour, linestyle=":", linewidth=1)
        for k, at in self.local.units.items():
            begins = self.local.flops[at] / 1e9
            axes.axvline(begins, color="C3", linewidth=0.8)
            axes.annotate(f" unit {k}", (begins, 1), xycoords=("data", "axes fraction"), va="bottom", color="C3")
        axes.set(xlabel="GFLOP computed", ylabel="live, MB", xlim=(0, None), ylim=(0, None))
        axes.legend(loc="upper right")
        figure.savefig(path, dpi=150)


def memory_report(model: LocalWrapper, *views: View, targets: Any = None) -> MemoryReport:
    """Predicts and counts the live bytes of ``model.local_step(*views)``, and counts those of end-to-end training.

    Runs on a copy without numbers, in seconds and without memory. Weights, their gradients and the views do not count.

    Args:
        model: what is to be trained.
        views: as for ``local_step``.
        targets: as for ``local_step``.

    Example:
        >>> net = nn.Sequential(*[nn.Conv2d(3 if k == 0 else 8, 8, 3, padding=1) for k in range(3)])
        >>> report = memory_report(LocalWrapper(net, [0, 1, 2]), *torch.rand(2, 4, 3, 16, 16))
        >>> [name for name in report.names]
        ['forward to stage 1', 'unit 0, forward to stage 2', 'unit 1']
    """
    with analysed(model) as mode:
        return _reported(model, views, targets, mode)


def _reported(model: LocalWrapper, views: Sequence[View], targets: Any, mode: FakeTensorMode) -> MemoryReport:
    with FakeCopyMode(mode):
        copied, again, whole = (deepcopy(model) for _ in range(3))
        pair, aims = deepcopy([mapped(torch.detach, view) for view in plain_views(views)]), deepcopy(targets)
    _unite(whole)
    with mode:
        actions = model._execution.actions
        batch = concatenated(pair, copy=model._changes_views)
        copied_views = sum(
            0 if joined.untyped_storage() is view.untyped_storage() else joined.nbytes
            for joined, view in zip(tensors(batch), tensors(pair[0]), strict=True)
        )
        ahead = predict(model.plan, actions, _weighed(again, batch), base=copied_views)
        del batch
        local, end_to_end = (_followed(one, pair, aims) for one in (copied, whole))
    names, predicted, counted = [], [], []
    starts = [at for at, action in enumerate(actions) if isinstance(action, Train)]
    bounds = [0, *starts, len(actions)]
    marks = [0, *(local.units[action.unit] for action in actions if isinstance(action, Train)), len(local.live)]
    for row in range(len(bounds) - 1):
        part = actions[bounds[row] : bounds[row + 1]]
        forwards = [action.stage for action in part if not isinstance(action, Train)]
        name = [f"unit {action.unit}" for action in part if isinstance(action, Train)]
        names.append(", ".join(name + ([f"forward to stage {forwards[-1]}"] if forwards else [])))
        predicted.append(max(phase.peak for phase in ahead[bounds[row] : bounds[row + 1]]))
        counted.append(max(local.live[marks[row] : marks[row + 1]]))
    return MemoryReport(tuple(names), tuple(predicted), tuple(counted), local, end_to_end)


def _unite(model: LocalWrapper) -> None:
    """Leaves one loss over everything, that of the highest unit."""
    model._execution = Execution(Plan(model.plan.stages, [Unit(0, model.plan.units[-1].last)]), model.schedule)
    model.decoders = model.decoders[-1:]
    model.sharing = Hard()
    if isinstance(model.loss, nn.ModuleList):
        model.loss = model.loss[-1]


def _weighed(model: LocalWrapper, batch: Any) -> list[list[Any]]:
    """Every stage as one piece, with what the units' decoders on it take."""
    ends = [Link(name, name, False, torch.Size()) for name in model.stages]
    attached: dict[int, list[nn.Module]] = {}
    for unit, decoder in zip(model.plan.units, model.decoders, strict=True):
        attached.setdefault(unit.last, []).append(decoder)
    pieces = weigh(model.backbone, batch, ends, None, None, model._runs, model.features, attached)
    return [[piece] for piece in pieces]


class _Followed(LiveBytes):
    """Notes what was computed at every change."""

    def __init__(self, flops: Flops) -> None:
        super().__init__()
        self.computed = [0]
        self._flops = flops

    def _add(self, size: int) -> None:
        super()._add(size)
        self.computed.append(self._flops.total)


def _followed(model: LocalWrapper, views: list[View], targets: Any) -> Timeline:
    flops, units = Flops(), dict[int, int]()
    live = _Followed(flops)

    def begins(k: int) -> Callable[..., None]:
        def note(*_: object) -> None:
            units.setdefault(k, len(live.history) - 1)

        return note

    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    for k, decoder in enumerate(model.decoders):
        decoder.register_forward_pre_hook(begins(k))
    with flops, live:
        model.local_step(*views, targets=targets)
    return Timeline(tuple(live.computed), tuple(live.history), units)
