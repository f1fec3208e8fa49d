"""torchvision's and timm's networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from works.families import images, mvit
from works.kinds import Network

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
# further ones, and what makes them small: options of timm.create_model
MORE_OF_TIMM: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"depth": 4, "embed_dim": 64, "num_heads": 2, "img_size": 64},
    "caformer_s18": {},
    "cait_xxs24_224": {"depth": 4, "img_size": 64},
    "coat_lite_tiny": {"img_size": 64},
    "coatnet_nano_rw_224": {"img_size": 64},
    "convit_tiny": {"img_size": 64},
    "crossvit_tiny_240": {"img_size": 120},
    "cspdarknet53": {},
    "davit_tiny": {},
    "deit_tiny_distilled_patch16_224": {"img_size": 64},
    "densenet121": {},
    "dm_nfnet_f0": {},
    "efficientformerv2_s0": {"img_size": 64},
    "efficientvit_b0": {},
    "efficientvit_m0": {},
    "eva02_tiny_patch14_224": {"img_size": 56},
    "fasternet_t0": {},
    "focalnet_tiny_srf": {},
    "gcvit_xxtiny": {},
    "hgnetv2_b0": {},
    "hiera_tiny_224": {},
    "hrnet_w18_small": {},
    "inception_resnet_v2": {},
    "inception_v4": {},
    "legacy_seresnet18": {},
    "legacy_xception": {},
    "mobilenetv4_conv_small": {},
    "mvitv2_tiny": {"img_size": 64},
    "nasnetalarge": {},
    "nest_tiny": {"img_size": 64},
    "nextvit_small": {},
    "pit_ti_distilled_224": {"img_size": 64},
    "pnasnet5large": {},
    "rdnet_tiny": {},
    "repvit_m0_9": {},
    "resnest14d": {},
    "samvit_base_patch16": {"depth": 4, "embed_dim": 64, "num_heads": 2, "img_size": 64, "global_attn_indexes": (1, 3)},
    "sequencer2d_s": {"img_size": 64},
    "shvit_s1": {},
    "swiftformer_xs": {},
    "swinv2_cr_tiny_ns_224": {"img_size": 64},
    "swinv2_tiny_window8_256": {"img_size": 64, "window_size": 4},
    "tnt_s_legacy_patch16_224": {"depth": 4, "img_size": 64},
    "tresnet_m": {},
    "twins_pcpvt_small": {"img_size": 64},
    "vgg11": {},
    "vit_relpos_small_patch16_224": {"depth": 4, "img_size": 64},
    "vitamin_small_224": {"img_size": 64},
    "volo_d1_224": {"img_size": 64},
    "xception41": {},
}
ONE_SIDE = {"maxvit_t": 224, "vit_b_32": 224, "inception_v3": 128}  # that the network insists on


def by_torchvision(name: str) -> tuple[nn.Module, int]:
    options = {"aux_logits": False, "init_weights": False} if name in ("inception_v3", "googlenet") else {}
    return torchvision.models.get_model(name, **options), ONE_SIDE.get(name, 64)


def by_timm(name: str, **options: Any) -> tuple[nn.Module, int]:
    model = timm.create_model(name, num_classes=3, **options)
    _, side, _ = timm.data.resolve_model_data_config(model)["input_size"]
    fixed = model.default_cfg.get("fixed_input_size") or "levit" in name or "efficientformer" in name
    return model, options.get("img_size", side if fixed else 64)


def _drawn(make: Callable[[], tuple[nn.Module, int]]) -> tuple[nn.Module, Callable[[], Tensor]]:
    model, side = make()
    return model, images(side)


def of_torchvision(name: str, **options: Any) -> Network:
    return Network("torchvision", partial(_drawn, partial(by_torchvision, name)), **options)


def of_timm(name: str, options: dict[str, Any] | None = None, **more: Any) -> Network:
    return Network("timm", partial(_drawn, partial(by_timm, name, **options or {})), **more)


def part(name: str, inner: str, batch: Callable[[], Any], **options: Any) -> Network:
    """A submodule of one of torchvision's models: what a detector or RAFT sees with."""

    def make() -> tuple[nn.Module, Callable[[], Any]]:
        made = {"weights": None, "weights_backbone": None} if "_fpn" in name or "ssd" in name else {"weights": None}
        return torchvision.models.get_model(name, **made).get_submodule(inner), batch

    return Network("torchvision", make, **options)


def clip(side: int = 32, frames: int = 8) -> Callable[[], Tensor]:
    return lambda: torch.rand(2, 3, frames, side, side)


def whole(name: str, batch: Callable[[], Any], **options: Any) -> Network:
    made = {"weights": None, **({"weights_backbone": None} if "_resnet50" in name or "_mobilenet" in name else {})}
    made |= {"quantize": False} if "quantized" in name else {}
    return Network("torchvision", lambda: (torchvision.models.get_model(name, **made), batch), **options)


def torchvision_networks() -> dict[str, Network]:
    return {
        **{name: of_torchvision(name) for name in [*TORCHVISION, "googlenet", "wide_resnet50_2"]},
        "fcn_resnet50": whole("fcn_resnet50", images(64)),
        "deeplabv3_mobilenet_v3_large": whole("deeplabv3_mobilenet_v3_large", images(64)),
        "lraspp_mobilenet_v3_large": whole("lraspp_mobilenet_v3_large", images(64)),
        "fasterrcnn_resnet50_fpn: backbone": part("fasterrcnn_resnet50_fpn", "backbone", images(64)),
        "maskrcnn_resnet50_fpn_v2: backbone": part("maskrcnn_resnet50_fpn_v2", "backbone", images(64)),
        "retinanet_resnet50_fpn: backbone": part("retinanet_resnet50_fpn", "backbone", images(64)),
        "ssd300_vgg16: backbone": part("ssd300_vgg16", "backbone", images(300)),
        "ssdlite320_mobilenet_v3_large: backbone": part("ssdlite320_mobilenet_v3_large", "backbone", images(128)),
        "raft_small: feature_encoder": part("raft_small", "feature_encoder", images(64)),
        **{name: whole(name, clip()) for name in ("r3d_18", "mc3_18", "r2plus1d_18")},
        "s3d": whole("s3d", clip(64, 16)),
        "swin3d_t": whole("swin3d_t", clip(64)),
        "MViT, small": Network("torchvision", lambda: (mvit(), lambda: torch.rand(2, 3, 4, 32, 32))),
        "quantized_resnet18, quantize=False": whole("quantized_resnet18", images(64)),
        "quantized_mobilenet_v2, quantize=False": whole("quantized_mobilenet_v2", images(64)),
    }


def timm_networks() -> dict[str, Network]:
    return {
        **{f"timm {name}": of_timm(name) for name in TIMM},
        **{f"timm {name}": of_timm(name, options) for name, options in MORE_OF_TIMM.items()},
    }
