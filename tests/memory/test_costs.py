"""What a step costs, to the last FLOP and byte: a change of these numbers is a change of the engine, and is to be explained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18

from locallearn import LocalWrapper
from locallearn.memory import measure

COUNTS: dict[tuple[int, bool], tuple[int, int, int]] = {  # overlap, checkpoint: FLOPs, peak bytes, saved bytes
    (0, False): (13_569_884_160, 22_169_612, 20_992_448),
    (0, True): (18_307_350_528, 18_875_924, 4_212_672),
    (1, False): (15_857_090_560, 28_319_244, 25_200_832),
    (1, True): (22_742_040_576, 19_405_372, 4_745_920),
    (3, False): (13_978_828_800, 37_914_124, 28_431_040),
    (3, True): (18_716_295_168, 17_171_988, 5_192_896),
}


@pytest.fixture(autouse=True)
def float32() -> None:
    torch.set_default_dtype(torch.float32)


def count(overlap: int, checkpoint: bool) -> tuple[int, int, int]:
    with FakeTensorMode():
        model = LocalWrapper(resnet18(), [f"layer{k}" for k in range(1, 5)], overlap, checkpoint=checkpoint)
        pair = torch.zeros(2, 8, 3, 64, 64).unbind()
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        return tuple(measure(lambda: model.local_step(*pair)))


@pytest.mark.skipif(torch.__version__ < "2.14", reason="the numbers were counted with torch 2.14 and 2.15")
@pytest.mark.parametrize(("overlap", "checkpoint"), COUNTS)
def test_a_step_costs_exactly_this(overlap: int, checkpoint: bool) -> None:
    flops, peak, saved = COUNTS[overlap, checkpoint]
    assert count(overlap, checkpoint) == (flops, peak, saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_does_not_grow_with_depth(dtype: torch.dtype) -> None:
    def peak(stages: int) -> int:
        with FakeTensorMode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            net = nn.Sequential(*[nn.Linear(256, 256) for _ in range(stages)])
            model = LocalWrapper(net, range(stages), decoder=lambda c: nn.Identity(), example=torch.zeros(2, 256))
            pair = torch.zeros(2, 8, 256).unbind()
            for weight in model.parameters():
                weight.grad = torch.zeros_like(weight)
            return measure(lambda: model.local_step(*pair)).peak_bytes

    scalars = 64 * 16  # each loss is a scalar, which takes at least a few bytes
    assert peak(16) <= peak(4) + scalars


class _Reads(TorchDispatchMode):
    """Counts what waits for a GPU: reading a value, or looking where values are."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"}:
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_step_waits_for_no_value(checkpoint: bool) -> None:
    model = LocalWrapper(resnet18(), [f"layer{k}" for k in range(1, 5)], checkpoint=checkpoint)
    pair, scale = torch.rand(2, 4, 3, 32, 32).unbind(), torch.tensor(8.0)
    model.local_step(*pair)  # the first one compares what is recomputed
    with _Reads() as reads:
        model.local_step(*pair, grad_scale=scale)
        (model(*pair, grad_scale=scale) * scale).backward()
        assert not reads.found
        assert float(scale) == 8
    assert reads.found
