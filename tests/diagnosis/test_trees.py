"""Stages that return several tensors, and backbones that take several: every look goes through them as a local pass does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from locallearn import LocalWrapper, MLPDecoder
from locallearn.diagnosis import Monitor, gradient_agreement, linear_cka, stage_quality


class Masked(nn.Module):
    """Hands a mask on beside what it computes."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.inner = nn.Linear(before, 6)

    def forward(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, mask = given
        return self.inner(x).tanh() * mask, mask


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = Masked(5), Masked(6), Masked(6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.three(self.two(self.one((x, mask))))[0]


def view(rows: int = 8) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, 5), "mask": torch.rand(rows, 1) + 0.5}


@pytest.fixture
def model() -> LocalWrapper:
    return LocalWrapper(Net(), ["one", "two", "three"], 1, MLPDecoder, example=view(2))


def test_gradients_are_compared(model: LocalWrapper) -> None:
    one, two = view(), view()
    report = gradient_agreement(model, one, two)
    assert report.stages[2].whole.cosine == pytest.approx(1)
    model.local_step(one, two)
    local = torch.cat([w.grad.flatten() for w in model.backbone.one.parameters()])
    model.zero_grad()
    LocalWrapper(model.backbone, model.stages, 2, [model.decoders[-1]], example=view(2)).local_step(one, two)
    whole = torch.cat([w.grad.flatten() for w in model.backbone.one.parameters()])
    assert report.stages[0].whole.cosine == pytest.approx(float(local @ whole / local.norm() / whole.norm()))


def test_features_are_those_that_decoders_read(model: LocalWrapper) -> None:
    given, labels = view(), torch.arange(8) % 2
    outlet, _ = model.backbone.one((given["x"], given["mask"]))
    seen: list[Tensor] = []

    def pool(features: Tensor) -> Tensor:
        seen.append(features)
        return features

    report = stage_quality(model, [(given, labels)], [(given, labels)], k=1, linear_probe=False, pool=pool)
    assert torch.equal(seen[0], outlet)
    assert [stage.knn for stage in report.stages] == [1, 1, 1]
    assert linear_cka(model, model, [given]).images == 8
    with pytest.raises(ValueError, match=r"labels of shape \(3,\)"):
        stage_quality(model, [(given, labels[:3])], [(given, labels)])


def test_a_monitor_sees_the_decoders(model: LocalWrapper) -> None:
    monitor = Monitor(model, every=1)
    model.local_step(view(), view())
    assert len(monitor.read()) == 8
