"""What a sharing strategy decides; a new one overrides what it needs and is passed to ``LocalWrapper`` as an object."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from locallearn.plan import Plan, Unit


class Sharing:
    """:term:`Units <unit>` of ``overlap + 1`` stages whose shared stages are trained by all of them."""

    def plan(self, stages: int, overlap: int) -> Plan:
        """Which stages each unit reaches and updates."""
        return Plan.windows(stages, overlap)

    def private(self, unit: Unit, stages: Sequence[nn.Module | None]) -> nn.Module | None:
        """What stands between the outlet of ``unit`` and its decoder, or ``None``.

        Args:
            unit: a unit of :meth:`plan`.
            stages: the backbone's stages; ``None`` for one that is more than one module.
        """
        return None

    def penalty(self, decoders: nn.ModuleList, stages: Sequence[nn.Module | None]) -> Tensor | None:
        """A scalar that is trained together with the units' losses, or ``None``."""
        return None
