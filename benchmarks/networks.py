"""The backbones whose training steps are compared: how each is built, cut and read, and its stages as lists of blocks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torchvision.models import VisionTransformer, convnext_tiny

from locallearn import ConvMLPDecoder, TokenDecoder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from backbones import ARCHITECTURES
from counting.step_costs import DECODER_WIDTHS, narrow_decoder


@dataclass(frozen=True)
class Network:
    """Attributes: `make(image_size)` builds the backbone; `chain` names what runs, in order, up to the last stage."""

    title: str
    make: Callable[[int], nn.Module]
    stages: tuple[str, ...]
    decoder: Callable[[int], nn.Module]
    chain: Callable[[nn.Module], Iterable[tuple[str, nn.Module]]]

    def blocks(self, backbone: nn.Module) -> list[list[nn.Module]]:
        """What runs in each stage, one module after the other; neighbouring simple layers, such as a stem's, are one."""
        stages: list[list[nn.Module]] = [[]]
        simple: list[nn.Module] = []
        for name, module in self.chain(backbone):
            if not _is_simple(module):
                stages[-1] += [nn.Sequential(*simple)] if simple else []
                simple = []
                stages[-1] += module if isinstance(module, nn.Sequential) else [module]
            else:
                simple.append(module)
            if name in self.stages:
                stages[-1] += [nn.Sequential(*simple)] if simple else []
                simple = []
                stages.append([])
            if name == self.stages[-1]:
                break
        return stages[:-1]


def _is_simple(module: nn.Module) -> bool:
    """A layer, or some in a row."""
    leaves = not any(any(child.children()) for child in module.children())
    return leaves and (isinstance(module, nn.Sequential) or not any(module.children()))


class _Tokens(nn.Module):
    """What torchvision's ViT does before its first block."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.patches, self.class_token, self.positions = vit.conv_proj, vit.class_token, vit.encoder.pos_embedding

    def forward(self, images: Tensor) -> Tensor:
        tokens = rearrange(self.patches(images), "n c h w -> n (h w) c")
        return torch.cat([self.class_token.expand(len(images), -1, -1), tokens], dim=1) + self.positions


def _vit_small(image_size: int) -> nn.Module:
    return VisionTransformer(image_size, 16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536)


def _vit_chain(vit: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    layers = vit.get_submodule("encoder.layers").named_children()
    return [("", _Tokens(vit)), *((f"encoder.layers.{name}", layer) for name, layer in layers)]


def _convnext_tiny(image_size: int) -> nn.Module:
    return convnext_tiny(stochastic_depth_prob=0.0)  # every step the same work


def _features(backbone: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    return [(f"features.{name}", module) for name, module in backbone.get_submodule("features").named_children()]


def _example(arch: str, title: str) -> Network:
    width = DECODER_WIDTHS.get(arch)
    decoder = partial(narrow_decoder, width=width) if width else ConvMLPDecoder
    known = ARCHITECTURES[arch]
    return Network(title, known.make, known.stages, decoder, nn.Module.named_children)


NETWORKS = {
    "resnet50": _example("resnet50", "ResNet-50"),
    "shufflenet_v2_50": _example("shufflenet_v2_50", "ShuffleNet v2-50"),
    "presnet50": _example("presnet50", "PResNet-50"),
    "vit_s": Network(
        "ViT-S/16",
        _vit_small,
        tuple(f"encoder.layers.encoder_layer_{k}" for k in (2, 5, 8, 11)),
        TokenDecoder,
        _vit_chain,
    ),
    "convnext_t": Network(
        "ConvNeXt-T", _convnext_tiny, tuple(f"features.{k}" for k in (1, 3, 5, 7)), ConvMLPDecoder, _features
    ),
}
