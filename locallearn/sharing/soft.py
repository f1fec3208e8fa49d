"""Every unit has a private copy of the stage above it, tied to the original by a penalty."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from typing_extensions import override

from locallearn.plan import Plan, Unit
from locallearn.sharing.base import Sharing


class Soft(Sharing):
    r"""Each unit trains one stage and a private copy of the next one, which is equal at the start (Table 5, L2 penalty).

    The copies are tied to the stages by

    .. math:: \text{coefficient} \cdot \sum_{w} \lVert w_{\text{copy}} - w_{\text{stage}} \rVert^2

    whose gradient goes to both sides. ``model.penalty`` reports it, apart from the losses. A copy runs a forward of its
    own, so this costs more than hard sharing and shares less: it is here for the comparison.

    Args:
        coefficient: the penalty's weight; the paper has 1e-4, 1e-3 and 1e-2 (65.5, 66.0 and 65.9).
    """

    def __init__(self, coefficient: float = 1e-3) -> None:
        if not coefficient >= 0:
            raise ValueError(f"the penalty's coefficient is at least 0; got {coefficient}")
        self.coefficient = coefficient

    @override
    def plan(self, stages: int, overlap: int) -> Plan:
        if overlap != 1:
            raise ValueError(
                f"soft sharing ties a unit to the next stage, so it needs overlap=1; got overlap={overlap}"
            )
        if stages < 2:
            raise ValueError(f"soft sharing needs at least two stages; got {stages}")
        return Plan.windows(stages, overlap=0)

    @override
    def private(self, unit: Unit, stages: Sequence[nn.Module | None]) -> nn.Module | None:
        if unit.last + 1 == len(stages):
            return None
        stage = stages[unit.last + 1]
        if stage is None:
            raise ValueError(
                f"soft sharing copies stage {unit.last + 1}, which must be one module that takes the outlet of stage "
                f"{unit.last} as its only argument. Put the operations between the two cuts into one module"
            )
        return PrivateStage(stage)

    @override
    def penalty(self, decoders: nn.ModuleList, stages: Sequence[nn.Module | None]) -> Tensor | None:
        distances: list[Tensor] = []
        for decoder, stage in zip(decoders, stages[1:], strict=False):
            assert stage is not None
            (copied,) = (part for part in decoder.modules() if isinstance(part, PrivateStage))
            for ours, theirs in zip(copied.parameters(), stage.parameters(), strict=True):
                distances.append((ours - theirs).square().sum())
        return self.coefficient * torch.stack(distances).sum() if distances else None


class PrivateStage(nn.Module):
    """A copy of a stage, with the same weights at the start."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = deepcopy(stage)

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.stage(features)
        return result
