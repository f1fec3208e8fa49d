"""What every unit does while it trains: its loss, whether it tells images apart, whether it collapses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from locallearn.diagnosis.measures import effective_rank, single, spread
from locallearn.diagnosis.picture import colour, panels, write
from locallearn.diagnosis.reading import check_wrapped
from locallearn.diagnosis.taps import Tap, after
from locallearn.diagnosis.watch import Watch
from locallearn.losses import InfoNCE
from locallearn.plan import whole
from locallearn.schedules import Train
from locallearn.wrapper import LocalWrapper

_ROWS = 512  # embeddings of a batch whose effective rank is taken

_TITLES = {
    "loss": "local loss: does it fall?",
    "top1": "contrastive top-1: are pairs found?",
    "spread": "spread: 0 in a point, 1 if even",
    "effective_rank": "effective rank of the embeddings",
}


class Monitor:
    """Looks at every ``every``-th training pass of ``model``, and tells of each unit what it saw.

    ==================  ===================================================================================
    loss                the unit's
    top1                share of embeddings whose nearest one is a positive, from the loss's own pass; only
                        where the loss is, or holds, an ``InfoNCE``
    spread              standard deviation of the normalised embeddings times ``sqrt(D)``: 0 in a point, 1 evenly
    effective_rank      RankMe of at most 512 embeddings
    ==================  ===================================================================================

    Embeddings are what the unit's decoder returns, where that is ``(N, D)``. Nothing waits for a GPU before :meth:`read`, and
    gradients are the same to the bit. Passes without gradients do not count. Each process monitors its own batches.

    It sits on the decoders and losses as hooks, which copies and pickles of the model do not carry on. Compile decoders
    before, not after. :meth:`close` takes the hooks off, as does leaving ``with Monitor(model) as monitor:``.

    Args:
        model: a wrapped backbone; of DistributedDataParallel, ``.module``.
        every: how many training passes there are between two that are looked at; the first one is. A step that accumulates
            micro-batches has several.
        settle: passes before a collapse is warned of: at random, a deep network's embeddings lie close together.
        patience: passes in a row without a finite loss, after which :meth:`read` raises; ``None``: never.
        warn: called with a line, in which the unit is named, when one goes wrong; by default ``warnings.warn``.

    Attributes:
        history: of each :meth:`read`, the number of the pass, from 1, and what it returned.

    Raises:
        TypeError: if ``model`` is not wrapped, or a setting is no whole number.
        ValueError: for an ``every`` or ``patience`` below 1, or a ``settle`` below 0.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 8))
        >>> model = LocalWrapper(net, [1, 2, 3], overlap=1, decoder=nn.LazyLinear, example=torch.rand(2, 4))
        >>> monitor = Monitor(model, every=2)
        >>> for step in range(3):
        ...     losses = model.local_step(torch.rand(5, 4), torch.rand(5, 4))
        ...     if monitor.due:
        ...         print(step, [*monitor.read()])
        0 ['loss/unit_0', 'loss/unit_1', 'top1/unit_0', 'top1/unit_1', 'spread/unit_0', 'spread/unit_1', ...]
        2 ['loss/unit_0', 'loss/unit_1', 'top1/unit_0', 'top1/unit_1', 'spread/unit_0', 'spread/unit_1', ...]
    """

    history: list[tuple[int, dict[str, float]]]

    def __init__(
        self,
        model: LocalWrapper,
        every: int = 50,
        *,
        settle: int = 100,
        patience: int | None = None,
        warn: Callable[[str], object] | None = None,
    ) -> None:
        check_wrapped(model)
        every = whole("every, the passes from one that is looked at to the next,", every, 1)
        settle = whole("settle, the passes before a collapse is warned of,", settle)
        if patience is not None:
            patience = whole("patience, the passes in a row without a finite loss (None: never raise),", patience, 1)
        if warn is not None and not callable(warn):
            raise TypeError(f"warn is called with a line; got {warn!r}")
        self.history = []
        self._model, self._every, self._settle, self._patience, self._say = model, every, settle, patience, warn
        self._watch = Watch(len(model.plan.units))
        self._first = next(action.unit for action in model.schedule(model.plan) if isinstance(action, Train))
        self._passes = self._looked = 0  # how many there were, and the number of the one that was looked at
        self._training = self._looking = self._unread = self._asks = False
        self._unit: int | None = None  # whose loss comes next
        self._losses = model.losses  # of the last pass that is done with
        self._taken: dict[str, dict[int, Tensor]] = {}
        self._off: list[Callable[[], object]] = []
        for k, decoder in enumerate(model.decoders):
            self._off.append(after(decoder, Tap(partial(self._embedded, k))))
        for loss, units in _contrastive(model).items():
            asks = loss.register_forward_pre_hook(Tap(partial(self._ask, units)), with_kwargs=True)
            # a monitor that was there before takes the share off, so it comes later
            told = loss.register_forward_hook(Tap(self._told), prepend=True)
            self._off += [asks.remove, told.remove]

    @property
    def due(self) -> bool:
        """Whether the last training pass was looked at, and not read yet. Does not wait for a GPU."""
        return self._unread and self._looked == self._passes

    def measured(self) -> dict[str, Tensor]:
        """What the last look saw, by name, one number per unit ``(units,)`` on its device, without waiting for it.

        Without the effective rank, which has to wait. nan where a unit has no such number.
        """
        self._finish()
        found: dict[str, Tensor] = {}
        units = range(len(self._model.plan.units))
        for name in ("loss", "top1", "spread"):
            if values := self._taken.get(name):
                one = next(iter(values.values()))
                missing = torch.full_like(one, torch.nan)
                found[name] = torch.stack([values.get(k, missing).to(one.device) for k in units])
        return found

    def read(self) -> dict[str, float]:
        """What the last look saw, ``{"loss/unit_0": 4.1, ...}``, ready for a logger; waits for the device.

        Empty before the first training pass. A name that a unit does not have is absent.

        Raises:
            DivergedError: after ``patience`` passes without a finite loss.
        """
        self._finish()
        flat = {
            f"{name}/unit_{k}": float(value)
            for name in ("loss", "top1", "spread")
            for k, value in sorted(self._taken.get(name, {}).items())
        }
        if not flat:
            return {}
        rows = self._taken.get("rows", {})
        flat |= {f"effective_rank/unit_{k}": effective_rank(embeddings) for k, embeddings in sorted(rows.items())}
        if self._model.penalty is not None:
            flat["penalty"] = float(self._model.penalty)
        if self._unread:
            self.history.append((self._looked, flat))
        self._unread = False
        settled, units = self._looked > self._settle, range(len(self._model.plan.units))
        spreads = [flat.get(f"spread/unit_{k}") if settled else None for k in units]
        for line in self._watch.judge(spreads, patience=self._patience):
            if self._say is None:
                warnings.warn(line, RuntimeWarning, stacklevel=2)
            else:
                self._say(line)
        return flat

    def save(self, path: str | PathLike[str]) -> None:
        """Draws what was read so far, a panel for each number and a line for each unit.

        Raises:
            ModuleNotFoundError: without matplotlib.
            ValueError: if nothing was read, or for a format that matplotlib does not have.
        """
        if not self.history:
            raise ValueError("there is nothing to draw: no training pass was read. Call monitor.read() while it trains")
        names = [
            name for name in _TITLES if any(key.startswith(f"{name}/") for _, flat in self.history for key in flat)
        ]
        asked = "Is every unit learning?"
        figure, axes = panels("Monitor.save", asked, count=len(names), size=(3.2 * len(names) + 0.6, 3.6))
        for panel, name in zip(axes, names, strict=True):
            for k, unit in enumerate(self._model.plan.units):
                seen = [(at, flat[f"{name}/unit_{k}"]) for at, flat in self.history if f"{name}/unit_{k}" in flat]
                label = f"unit {k}: stage{'s' if unit.first < unit.last else ''} {unit.first}"
                label += f" to {unit.last}" if unit.first < unit.last else ""
                style = "-" if len(seen) > 1 else "o"
                panel.plot([at for at, _ in seen], [value for _, value in seen], style, color=colour(k), label=label)
            panel.set_title(_TITLES[name], fontsize=9)
            panel.set(xlabel="training pass", ylim=(0, None))
        axes[0].legend(fontsize=8)
        write(figure, "Monitor.save", path)

    def close(self) -> None:
        """Takes the hooks off; what was read stays."""
        while self._off:
            self._off.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _finish(self) -> None:
        """Takes note of the losses of the pass that has ended."""
        losses = self._model.losses
        if losses is self._losses or losses is None:
            return
        self._losses = losses
        if self._training:
            self._watch.see(losses)
            if self._looking:
                self._taken["loss"] = dict(enumerate(single(losses)))

    def _embedded(self, k: int, output: object) -> None:
        """The decoder of unit ``k`` has run."""
        if k == self._first:
            self._finish()
            self._training = torch.is_grad_enabled()
            self._looking = self._training and self._passes % self._every == 0
            self._passes += self._training
            if self._looking:
                self._taken, self._looked, self._unread = {}, self._passes, True
        if not self._looking:
            return
        self._unit = k
        if isinstance(output, Tensor) and output.ndim == 2 and output.is_floating_point():
            with torch.no_grad():
                self._taken.setdefault("spread", {})[k] = spread(output)
                step = -(-len(output) // _ROWS)
                self._taken.setdefault("rows", {})[k] = output.detach()[::step].clone()

    def _ask(
        self, units: set[int], loss: InfoNCE, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        if self._unit not in units:
            self._unit = None
        self._asks = self._looking and self._unit is not None and not (loss.return_top1 or "return_top1" in kwargs)
        return (args, kwargs | {"return_top1": True}) if self._asks else None

    def _told(self, loss: InfoNCE, args: object, output: object) -> object:
        if not self._looking or self._unit is None or not isinstance(output, tuple):
            return None
        k, self._unit = self._unit, None
        self._taken.setdefault("top1", {})[k] = output[1].detach().float().mean()
        return output[0] if self._asks else None


def _contrastive(model: LocalWrapper) -> dict[InfoNCE, set[int]]:
    """Every ``InfoNCE`` in the losses, and the units that it may be called for."""
    units = range(len(model.plan.units))
    losses: list[Any] = [model.loss[k] if isinstance(model.loss, nn.ModuleList) else model.loss for k in units]
    found: dict[InfoNCE, set[int]] = {}
    for k in units:
        for part in losses[k].modules() if isinstance(losses[k], nn.Module) else ():
            if isinstance(part, InfoNCE):
                found.setdefault(part, set()).add(k)
    return found
