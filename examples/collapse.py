"""Does a unit still tell images apart? Its embeddings' spread and its loss, watched while it trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn import InfoNCE

COLLAPSED = 0.1  # spread below which nearly nothing tells images apart
PATIENCE = 5  # steps in a row without a finite loss, after which a run is lost


class DivergedError(Exception):
    """Losses are no numbers any more; the message says whose."""


def spread(embeddings: Tensor) -> Tensor:
    """The standard deviation over a batch of normalised embeddings `(N, D)`, times sqrt(D).

    1 where they lie evenly on the sphere, 0 where they are all the same (Chen & He 2021, section 4.1).
    """
    points = F.normalize(embeddings.detach().to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1)
    return points.std(dim=0, correction=0).mean() * points.shape[1] ** 0.5


class Watched(nn.Module):
    """A unit's loss, which keeps what the last batch told beside it.

    Attributes:
        accuracy: share of embeddings whose nearest one is their own positive.
        std: `spread` of the embeddings.
    """

    accuracy: Tensor
    std: Tensor

    def __init__(self, loss: InfoNCE) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, *outputs: Tensor) -> Tensor:
        value, self.accuracy = self.loss(*outputs)
        self.std = spread(torch.cat([output for output in outputs if output.is_floating_point()]))
        return value


class Watch:
    """Warns of units that collapse or lose their numbers, once each time, and stops a run that is lost."""

    def __init__(self, units: int, device: torch.device) -> None:
        self._in_a_row = torch.zeros(units, dtype=torch.long, device=device)
        self._known: set[tuple[int, str]] = set()

    def see(self, losses: Tensor) -> None:
        """Note a step's losses `(units,)`, without waiting for the device."""
        self._in_a_row = torch.where(losses.isfinite(), 0, self._in_a_row + 1)

    @property
    def healthy(self) -> bool:
        """Whether all of the last step's losses were finite: if not, the weights may be none worth keeping."""
        return not self._in_a_row.any()

    def judge(self, std: Sequence[float]) -> list[str]:
        """A line for each unit that has gone wrong since the last call, given each one's `spread`.

        Raises `DivergedError` where a loss has not been finite for several steps.
        """
        in_a_row = self._in_a_row.tolist()
        if lost := [str(unit) for unit, steps in enumerate(in_a_row) if steps >= PATIENCE]:
            raise DivergedError(
                f"the loss of unit {', '.join(lost)} has not been finite for {max(in_a_row)} steps in a row; "
                "lower --lr, warm up for longer, or leave --amp away"
            )
        wrong = {(unit, "its loss is not finite") for unit, steps in enumerate(in_a_row) if steps}
        wrong |= {(unit, "it collapses") for unit, value in enumerate(std) if value < COLLAPSED}
        new, self._known = wrong - self._known, wrong
        return [
            f"unit {unit}: {what} (std of its embeddings {std[unit]:.3f}, evenly spread 1)"
            for unit, what in sorted(new)
        ]
