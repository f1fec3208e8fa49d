"""The paper's memory saving and our cost, counted exactly on ResNet-50 at batch 64 and 224 pixels, without a byte of it."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import resnet50

from locallearn import ConvMLPDecoder, LocalWrapper, MLPDecoder
from locallearn.measure import Cost, measure

STAGES = ["layer1", "layer2", "layer3", "layer4"]


@cache
def cost(overlap: int, decoder: type[MLPDecoder] | type[ConvMLPDecoder]) -> Cost:
    """Of the second step, so that gradients are there already."""
    torch.set_default_dtype(torch.float32)
    with FakeTensorMode():
        model = LocalWrapper(resnet50(), STAGES, overlap, decoder)
        views = torch.zeros(2, 32, 3, 224, 224).unbind()
        model.local_step(*views)
        return measure(lambda: model.local_step(*views))


SIMCLR, GIM, LOCO = (3, MLPDecoder), (0, ConvMLPDecoder), (1, ConvMLPDecoder)


def test_loco_computes_each_weight_gradient_once() -> None:
    assert cost(*LOCO).flops <= 1.25 * cost(3, ConvMLPDecoder).flops


@pytest.mark.parametrize(("method", "ratio"), [(GIM, 1.81), (LOCO, 1.28)])
def test_saved_bytes_fall_by_the_papers_factor(method, ratio: float) -> None:  # type: ignore[no-untyped-def]
    assert cost(*SIMCLR).saved_bytes >= ratio * cost(*method).saved_bytes


@pytest.mark.parametrize(("method", "ratio"), [(GIM, 1.75), (LOCO, 1.14)])
def test_the_peak_of_live_bytes_falls(method, ratio: float) -> None:  # type: ignore[no-untyped-def]
    assert cost(*SIMCLR).peak_bytes >= ratio * cost(*method).peak_bytes
