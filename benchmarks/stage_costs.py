"""Seconds that each stage of a wrapped backbone takes, by what is done with it: what a replay is made of."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from replay import Costs
from torch import Tensor

from locallearn import LocalWrapper
from locallearn._walk.cuts import hooked, submodules
from locallearn._walk.segment import Segment, cut


def stage_costs(model: LocalWrapper, images: Tensor, repeats: int = 5) -> list[Costs]:
    """Medians over ``repeats`` forwards, after one that does not count.

    Args:
        model: with a decoder for every stage, ``overlap=0``.
        images: two views, one after the other.
        repeats: how often.
    """
    if len(model.decoders) != len(model.stages):
        raise ValueError("costs are of stages with a decoder each; wrap with overlap=0")
    times = [{name: list[float]() for name in Costs._fields} for _ in model.stages]
    for _ in range(repeats + 1):
        _Clock(model, images.device, times).run(images)
    return [Costs(*(median(stage[name][1:]) for name in Costs._fields)) for stage in times]


class _Clock:
    """One forward, in which everything is tried at the end of each stage."""

    def __init__(self, model: LocalWrapper, device: torch.device, times: list[dict[str, list[float]]]) -> None:
        self._model, self._device, self._times = model, device, times
        self._inlets: list[Tensor] = []
        self._mark = 0.0

    def run(self, images: Tensor) -> None:
        hooks = hooked(submodules(self._model.backbone, self._model.stages), self._at_cut)
        self._inlets, handed_on = cut(images.detach().requires_grad_(), differentiable=True)
        self._mark = self._now()
        with hooks, hooks:
            self._model.backbone(handed_on)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _at_cut(self, stage: int, outlet: Any) -> Any:
        times = self._times[stage]
        times["forward"].append(self._now() - self._mark)
        segment = Segment(outlet, self._inlets)
        gradient = torch.rand_like(outlet)
        leaves, features = cut(outlet, differentiable=True)

        self._mark = self._now()
        loss = self._model.loss(*self._model.decoders[stage](features).chunk(2))  # type: ignore[operator]
        loss.backward(inputs=[*self._model.decoders[stage].parameters(), *leaves])
        times["decoder"].append(self._now() - self._mark)

        self._mark = self._now()
        segment.pull([gradient], retain=True)
        times["pull"].append(self._now() - self._mark)

        self._mark = self._now()
        roots, gradients = segment.start([gradient])
        torch.autograd.backward(roots, gradients, inputs=segment.weights)
        times["push"].append(self._now() - self._mark)
        self._inlets, handed_on = cut(outlet, differentiable=True)
        self._mark = self._now()
        return handed_on
