"""The report predicts each unit's peak, counts it, and draws it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from locallearn import LocalWrapper, MemoryReport, MLPDecoder, fused, memory_report
from locallearn.memory import measure

STAGES = ["layer1", "layer2", "layer3", "layer4"]


def views() -> tuple[Tensor, ...]:
    return torch.rand(2, 8, 3, 64, 64, dtype=torch.float32).unbind()


@pytest.fixture
def single_precision() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("single_precision")
@pytest.mark.parametrize("overlap", [0, 1, 2])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_predicted_and_counted_are_those_of_a_real_step(overlap: int, checkpoint: bool) -> None:
    model, pair = LocalWrapper(resnet18(), STAGES, overlap, checkpoint=checkpoint), views()
    report = memory_report(model, *pair)
    assert all(weight.grad is None for weight in model.parameters())
    model.local_step(*pair)
    real = measure(lambda: model.local_step(*pair))
    assert max(report.counted) == max(report.local.live) == real.peak_bytes
    assert max(report.predicted) == pytest.approx(real.peak_bytes, rel=0.1)
    assert report.local.flops[-1] == real.flops
    assert len(report.names) == len(model.plan.units) + 1


@pytest.mark.usefixtures("single_precision")
def test_the_other_one_is_end_to_end_training() -> None:
    model, pair = LocalWrapper(resnet18(), STAGES, 1), views()
    whole = LocalWrapper(model.backbone, STAGES, 3, decoder=[model.decoders[-1]])
    whole.local_step(*pair)
    expected = measure(lambda: whole.local_step(*pair)).peak_bytes
    assert max(memory_report(model, *pair).end_to_end.live) == expected


def report() -> MemoryReport:
    net = nn.Sequential(*[nn.Conv2d(3 if k == 0 else 8, 8, 3, padding=1) for k in range(3)])
    return memory_report(LocalWrapper(net, [0, 1, 2], decoder=MLPDecoder), *torch.rand(2, 4, 3, 16, 16))


def test_it_prints_a_row_per_unit() -> None:
    rows = [line[:28].strip() for line in str(report()).splitlines()]
    assert rows == [
        *("peak, MB", "forward to stage 1", "unit 0, forward to stage 2", "unit 1", "the step", "end-to-end")
    ]


def test_units_of_the_fused_schedule_come_after_the_forward() -> None:
    net = nn.Sequential(*[nn.Conv2d(3 if k == 0 else 8, 8, 3, padding=1) for k in range(3)])
    model = LocalWrapper(net, [0, 1, 2], decoder=MLPDecoder, schedule=fused)
    assert memory_report(model, *torch.rand(2, 4, 3, 16, 16)).names == ("forward to stage 2", "unit 0", "unit 1")


def test_it_is_saved_as_a_picture(tmp_path: Path) -> None:
    report().save(tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        report().save(tmp_path / "memory.png")


def test_a_model_that_is_not_wrapped_is_refused() -> None:
    with pytest.raises(TypeError, match=r"looked at in a LocalWrapper; got Linear\. Wrap it"):
        memory_report(torch.nn.Linear(2, 2), torch.rand(2, 2))
