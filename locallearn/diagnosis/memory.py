"""The memory of a local step, predicted and counted, as a table and as a picture beside end-to-end training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from typing import Any

import torch
from torch import nn

from locallearn._fitting.attach import FromOutlet
from locallearn._fitting.batches import View, concatenated, plain_views
from locallearn._walk.trees import mapped, tensors
from locallearn.diagnosis.picture import panels, write
from locallearn.diagnosis.reading import check_wrapped
from locallearn.memory.count import Flops, LiveBytes
from locallearn.memory.fakes import Fakes, analysed
from locallearn.memory.pieces import Piece, Sample
from locallearn.memory.places import places
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
            ValueError: for a format that matplotlib does not have.
        """
        figure, (axes,) = panels("MemoryReport.save", "What is alive during a step?")
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
        write(figure, "MemoryReport.save", path)


def memory_report(model: LocalWrapper, *views: View, targets: Any = None) -> MemoryReport:
    """Predicts and counts the live bytes of ``model.local_step(*views)``, and counts those of end-to-end training.

    Runs on a copy without numbers, in seconds and without memory. Weights, their gradients and the views do not count.

    Args:
        model: what is to be trained.
        views: as for ``local_step``.
        targets: as for ``local_step``.

    Raises:
        TypeError: if the model is not wrapped.
        RuntimeError: if the copy does not run without numbers, where a number decides (a mixture of experts).

    Example:
        >>> net = nn.Sequential(*[nn.Conv2d(3 if k == 0 else 8, 8, 3, padding=1) for k in range(3)])
        >>> report = memory_report(LocalWrapper(net, [0, 1, 2]), *torch.rand(2, 4, 3, 16, 16))
        >>> [name for name in report.names]
        ['forward to stage 1', 'unit 0, forward to stage 2', 'unit 1']
    """
    check_wrapped(model)
    with analysed(model) as fakes:
        try:
            return _reported(model, views, targets, fakes)
        except RuntimeError as error:  # a number decides, for instance, and there is none
            raise RuntimeError(
                f"a copy of {type(model.backbone).__name__} does not run without numbers ({type(error).__name__}: {error}). If "
                "model.local_step(*views) does, count that: locallearn.memory.measure(lambda: model.local_step(*views))"
            ) from error


def _reported(model: LocalWrapper, views: Sequence[View], targets: Any, fakes: Fakes) -> MemoryReport:
    copied, again, whole = (fakes.copy(model) for _ in range(3))
    pair, aims = fakes.copy([mapped(torch.detach, view) for view in plain_views(views)]), fakes.copy(targets)
    _unite(whole)
    with fakes:
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


def _weighed(model: LocalWrapper, batch: Any) -> list[list[Piece]]:
    """The pieces of every stage, the last of them with what the units' decoders on it take."""
    sample = Sample(model.backbone, batch, model.stages, model.features, disturb=True)
    found = list(model._runs)
    between = places(model.backbone, sample.chain, sample.rows, found)
    ends = [link for link in sample.chain if link in between or link.end in model.stages]
    at = {link.end: number for number, link in enumerate(ends)}
    pieces = sample.pieces(ends, found)[1]
    for k, unit in enumerate(model.plan.units):
        number = at[model.stages[unit.last]]
        end, decoder = ends[number], model.decoders[k]
        given = sample.whole(end) if isinstance(decoder, FromOutlet) else sample.like(end.outlet)
        takes, spent = sample.train(decoder, given)
        if takes > pieces[number].train:
            pieces[number] = pieces[number]._replace(train=takes, decoder_flops=spent)
    bounds = [0, *(at[stage] + 1 for stage in model.stages)]
    return [pieces[a:b] for a, b in pairwise(bounds)]


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
