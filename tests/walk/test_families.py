"""Families of torchvision and timm: recomputed, their gradients and buffers are those of a pass that keeps everything.

CI takes a few, ``pytest tests/walk/test_families.py --full`` all of them: ten minutes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torchvision
from oracle import assert_same, gradients
from torch import Tensor, nn
from torch.nn import functional as F

from locallearn import LocalWrapper
from locallearn._fitting.chain import links

timm = pytest.importorskip("timm", reason="the extra `examples` has timm")

TORCHVISION = """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s inception_v3 maxvit_t mnasnet0_5 mobilenet_v2
    mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5
    squeezenet1_0 swin_t swin_v2_t vgg11 vgg11_bn vit_b_32
""".split()  # noqa: SIM905 - one name a line would be a page
TIMM = """
    botnet26t_256 convmixer_768_32 convnext_atto convnextv2_atto cspresnet50 deit_tiny_patch16_224 dla34 dpn48b
    edgenext_xx_small efficientformer_l1 efficientnet_b0 ese_vovnet19b_dw fastvit_t8 gernet_s ghostnet_050
    hardcorenas_a inception_next_atto lcnet_035 levit_128s mambaout_femto mixer_s32_224 mobilenetv3_small_050
    mobilevit_xxs mobilevitv2_050 nf_resnet26 poolformer_s12 pvt_v2_b0 regnetx_002 regnety_002 repghostnet_050
    repvgg_a0 res2net50_14w_8s resmlp_12_224 resnet10t resnet26d resnetv2_50 rexnet_100 selecsls42 semnasnet_075
    skresnet18 starnet_s1 swin_tiny_patch4_window7_224 tiny_vit_5m_224 tinynet_e visformer_tiny vit_tiny_patch16_224
    xcit_nano_12_p16_224
""".split()  # noqa: SIM905 - one name a line would be a page
SAMPLE = {"mobilenet_v3_small", "densenet121", "timm resnetv2_50", "timm convnext_atto", "timm mobilevit_xxs"}
FIXED = {"maxvit_t": 224, "vit_b_32": 224, "inception_v3": 128}  # a side that the network insists on


def by_torchvision(name: str) -> tuple[nn.Module, int]:
    options = {"aux_logits": False, "init_weights": False} if name == "inception_v3" else {}
    return torchvision.models.get_model(name, **options), FIXED.get(name, 64)


def by_timm(name: str) -> tuple[nn.Module, int]:
    model = timm.create_model(name, num_classes=3)
    _, side, _ = timm.data.resolve_model_data_config(model)["input_size"]
    fixed = model.default_cfg.get("fixed_input_size") or "levit" in name or "efficientformer" in name
    return model, side if fixed else 64


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
