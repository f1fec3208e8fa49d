"""Families of torchvision and timm: recomputed, their gradients and buffers are those of a pass that keeps everything.

CI takes a few, ``pytest tests/walk/test_families.py --full`` all of them: ten minutes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from oracle import assert_same, gradients
from torch import Tensor, nn
from torch.nn import functional as F

from locallearn import LocalWrapper
from locallearn._fitting.chain import links

pytest.importorskip("timm", reason="the extra `examples` has timm")
from works.image_networks import TIMM, TORCHVISION, by_timm, by_torchvision

SAMPLE = {"mobilenet_v3_small", "densenet121", "timm resnetv2_50", "timm convnext_atto", "timm mobilevit_xxs"}

NETWORKS: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    **{name: partial(by_torchvision, name) for name in TORCHVISION},
    **{f"timm {name}": partial(by_timm, name) for name in TIMM},
}


class Pooled(nn.Module):
    """Sixteen means of any outlet."""

    def forward(self, outlet: Tensor) -> Tensor:
        return F.adaptive_avg_pool1d(outlet.flatten(1).unsqueeze(1), 16).squeeze(1)


def test_the_sample_is_among_the_families() -> None:
    assert set(NETWORKS) >= SAMPLE


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "overlap" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full")
        metafunc.parametrize("name", NETWORKS if full else sorted(SAMPLE))
        metafunc.parametrize("overlap", [0, 1] if full else [1])


def test_a_recomputed_family_is_as_without(name: str, overlap: int) -> None:
    with torch.random.fork_rng():
        backbone, side = NETWORKS[name]()
    backbone = backbone.double().train()
    pair = torch.rand(2, 2, 3, side, side).unbind()
    chain = [link.end for link in links(backbone, torch.cat(pair)) if len(link.outlet.shape) > 2]
    stages = [chain[(k + 1) * len(chain) // 4 - 1] for k in range(4)]
    results = []
    for policy in (False, True):
        model = LocalWrapper(
            copy.deepcopy(backbone),
            stages,
            overlap,
            [Pooled() for _ in range(4 - overlap)],
            example=pair[0],
            checkpoint=policy,
        )
        assert bool(model._runs) == policy
        torch.manual_seed(1)
        losses = [model.local_step(*pair) for _ in range(2)]
        results.append((torch.stack(losses), gradients(model), dict(model.named_buffers())))
    (losses, expected, buffers), (ours, found, after) = results
    torch.testing.assert_close(ours, losses)
    assert_same(found, expected)
    torch.testing.assert_close(after, buffers)
