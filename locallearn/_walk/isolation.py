"""Stages share nothing but the tensor that passes the cut between them: found by what their graphs reach."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import ref

from torch import Tensor, nn


class Isolation:
    """Notes who uses which weight and which inlet during one forward, and refuses what crosses a cut.

    Args:
        backbone: names the parameters in messages.
        cuts: the names of the stages' last modules, for messages.
    """

    def __init__(self, backbone: nn.Module, cuts: tuple[str, ...]) -> None:
        self._backbone = backbone
        self._cuts = cuts
        self._users: dict[Tensor, str] = {}
        self._inlets: list[tuple[int, ref[Tensor]]] = []  # weak: an inlet is as large as an activation

    def opens(self, stage: int, inlet: Tensor) -> None:
        """The graph of ``stage`` begins at ``inlet``."""
        self._inlets = [(below, known) for below, known in self._inlets if known() is not None]
        self._inlets.append((stage, ref(inlet)))

    def claim_stage(self, stage: int, weights: Iterable[Tensor]) -> None:
        """``stage`` uses ``weights``.

        Raises:
            ValueError: if one of them is another stage's, or is another stage's inlet.
        """
        self._claim(f"stage {stage} ({self._cuts[stage]!r})", weights)

    def claim_unit(self, weights: Iterable[Tensor]) -> None:
        """A decoder or a loss uses ``weights``; units may share them with each other, but not with the backbone."""
        self._claim("a decoder or a loss", weights)

    def _claim(self, user: str, weights: Iterable[Tensor]) -> None:
        inlets = {inlet: stage for stage, known in self._inlets if (inlet := known()) is not None}
        crossing: list[str] = []
        for weight in weights:
            if (stage := inlets.get(weight)) is not None:
                crossing.append(f"the outlet of stage {stage - 1} ({self._cuts[stage - 1]!r})")
            elif (other := self._users.setdefault(weight, user)) != user:
                crossing.append(f"{self._name(weight)}, which {other} uses too")
        if crossing:
            more = f"; and {len(crossing) - 3} more" if len(crossing) > 3 else ""
            raise ValueError(
                f"{user} uses {'; '.join(crossing[:3])}{more}. A skip connection or a shared parameter crosses a cut, which "
                "only one tensor may. Move the cuts (stages=) so that both uses lie in one stage"
            )

    def _name(self, weight: Tensor) -> str:
        for name, parameter in self._backbone.named_parameters():
            if parameter is weight:
                return f"parameter {name!r}"
        return f"a trainable tensor of shape {tuple(weight.shape)}"
