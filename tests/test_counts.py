"""What a step costs, to the last FLOP and byte: a change of these numbers is a change of the engine, and is to be explained."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import resnet18

from locallearn import LocalWrapper
from locallearn.measure import measure

COUNTS: dict[tuple[int, bool], tuple[int, int, int]] = {  # overlap, checkpoint: FLOPs, peak bytes, saved bytes
    (0, False): (13_570_015_232, 22_169_612, 20_999_760),
    (0, True): (18_307_481_600, 18_875_924, 4_219_984),
    (1, False): (15_857_188_864, 28_319_244, 25_208_144),
    (1, True): (22_742_138_880, 19_405_372, 4_753_232),
    (3, False): (13_978_861_568, 37_914_124, 28_438_352),
    (3, True): (18_716_327_936, 17_171_988, 5_200_208),
}


def count(overlap: int, checkpoint: bool) -> tuple[int, int, int]:
    torch.set_default_dtype(torch.float32)
    with FakeTensorMode():
        model = LocalWrapper(resnet18(), [f"layer{k}" for k in range(1, 5)], overlap, checkpoint=checkpoint)
        pair = torch.zeros(2, 8, 3, 64, 64).unbind()
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        return tuple(measure(lambda: model.local_step(*pair)))


@pytest.mark.skipif(torch.__version__ < "2.15", reason="the numbers were counted with torch 2.15")
@pytest.mark.parametrize(("overlap", "checkpoint"), COUNTS)
def test_a_step_costs_exactly_this(overlap: int, checkpoint: bool) -> None:
    flops, peak, saved = COUNTS[overlap, checkpoint]
    assert count(overlap, checkpoint) == (flops, peak, saved)
