"""Says of which units the embeddings collapse, or the loss is no number any more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COLLAPSED = 0.1  # spread below which nearly nothing tells images apart


class DivergedError(RuntimeError):
    """Losses are no numbers any more; the message says whose."""


class Watch:
    """Warns of units that collapse or lose their numbers, once each time.

    Args:
        units: how many there are.

    Example:
        >>> watch = Watch(2)
        >>> watch.see(torch.tensor([4.2, 4.8]))
        >>> watch.judge([0.9, 0.05])
        ['unit 1: it collapses (std of its embeddings 0.050, evenly spread 1)']
        >>> watch.judge([0.9, 0.04])  # known
        []
    """

    def __init__(self, units: int) -> None:
        self._in_a_row = torch.zeros(units, dtype=torch.long)
        self._known: set[tuple[int, str]] = set()

    def see(self, losses: Tensor) -> None:
        """Notes a step's losses ``(units,)``, without waiting for the device."""
        before = self._in_a_row.to(losses.device, non_blocking=True)
        self._in_a_row = torch.where(losses.isfinite(), 0, before + 1)

    @property
    def healthy(self) -> bool:
        """Whether all of the last step's losses were finite: if not, the weights may be none worth keeping."""
        return not self._in_a_row.any()

    def judge(self, spreads: Sequence[float | None], *, patience: int | None = None) -> list[str]:
        """A line for each unit that has gone wrong since the last call.

        Args:
            spreads: of each unit's embeddings, see :func:`locallearn.diagnosis.spread`; ``None`` where it is not known.
            patience: after how many steps in a row without a finite loss a run is lost; ``None``: never.

        Raises:
            DivergedError: where it is.
        """
        in_a_row = self._in_a_row.tolist()
        if lost := [str(unit) for unit, steps in enumerate(in_a_row) if patience is not None and steps >= patience]:
            raise DivergedError(
                f"{_losses(lost)} not been finite for {max(in_a_row)} steps in a row; lower the "
                "learning rate, warm up for longer, or train in a wider precision"
            )
        wrong = {(unit, "its loss is not finite") for unit, steps in enumerate(in_a_row) if steps}
        wrong |= {
            (unit, "it collapses") for unit, value in enumerate(spreads) if value is not None and value < COLLAPSED
        }
        new, self._known = wrong - self._known, wrong
        return [f"unit {unit}: {what}{_spread(spreads[unit])}" for unit, what in sorted(new)]


def _losses(units: Sequence[str]) -> str:
    if len(units) == 1:
        return f"the loss of unit {units[0]} has"
    return f"the losses of units {', '.join(units[:-1])} and {units[-1]} have"


def _spread(value: float | None) -> str:
    return "" if value is None else f" (std of its embeddings {value:.3f}, evenly spread 1)"
