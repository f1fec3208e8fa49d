"""Names by the rule that the docstring states."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn
from torchvision import models
from zoo import conv

from locallearn import LocalWrapper, stages_of


@pytest.fixture(autouse=True)
def single_precision() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("build", "stages"),
    [
        (models.resnet18, ["layer1", "layer2", "layer3", "layer4"]),
        (models.regnet_y_400mf, [f"trunk_output.block{k}" for k in (1, 2, 3, 4)]),
        (models.efficientnet_b0, ["features.2", "features.3", "features.5", "features.8"]),
        (models.swin_t, [f"features.{k}" for k in (1, 3, 5, 7)]),
        (lambda: timm.create_model("convnext_atto"), [f"stages.{k}" for k in range(4)]),
        (lambda: timm.create_model("vit_tiny_patch16_224"), [f"blocks.{k}" for k in (2, 5, 8, 11)]),
        (lambda: timm.create_model("mixer_s32_224"), [f"blocks.{k}" for k in (1, 3, 5, 7)]),
    ],
)
def test_known_families(build: Callable[[], nn.Module], stages: list[str]) -> None:
    net = build()
    assert stages_of(net) == tuple(stages)
    LocalWrapper(net, stages_of(net))


def test_a_pooling_elsewhere_ends_the_last_stage() -> None:
    assert stages_of(models.vgg11(), 3) == ("features.12", "features.17", "avgpool")


@pytest.mark.parametrize(("n", "stages"), [(1, ["layer4"]), (2, ["layer3", "layer4"]), (8, None)])
def test_other_numbers(n: int, stages: list[str] | None) -> None:
    expected = stages or [f"layer{k}.{j}" for k in (1, 2, 3, 4) for j in (0, 1)]
    assert stages_of(models.resnet18(), n, torch.rand(2, 3, 64, 64)) == tuple(expected)


def test_parts_differ_by_one_block_at_most() -> None:
    net = nn.Sequential(*(nn.Sequential(conv(3 if k == 0 else 4, 4), nn.ReLU()) for k in range(7)))
    assert stages_of(net, 3, torch.rand(2, 3, 8, 8)) == ("1", "3", "6")


def test_a_resolution_without_weights_does_not_count() -> None:
    net = nn.Sequential(conv(3, 4), conv(4, 4, 2), nn.AvgPool2d(2))
    assert stages_of(net, 2, torch.rand(2, 3, 8, 8)) == ("0", "2")


class Sublayers(nn.Module):
    """Can be cut inside: normalised after every part, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm, self.top, self.end = (nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x + self.mix(x))
        return self.end(x + self.top(x))  # type: ignore[no-any-return]


def test_children_of_one_class_are_taken_whole_though_they_can_be_cut_inside() -> None:
    net = nn.Sequential(nn.Linear(4, 4), *(Sublayers() for _ in range(4)))
    assert stages_of(net, 2, torch.rand(2, 5, 4)) == ("2", "4")


def test_too_few_blocks_are_told() -> None:
    with pytest.raises(ValueError, match=r"3 stages need as many blocks, .*\['0', '1'\]"):
        stages_of(nn.Sequential(conv(3, 4), conv(4, 4)), 3, torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match="the number of stages, is a whole number, at least 1; got 0"):
        stages_of(conv(3, 4), 0)
