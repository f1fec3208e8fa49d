"""Other normalisations in the place of BatchNorm: by groups of channels, or over all processes' images."""

from __future__ import annotations

import math

from torch import nn

GROUPS = 32  # Wu & He 2018


def group_norm(width: int) -> nn.GroupNorm:
    """As many groups as 32 and the width allow; the second argument that torchvision's `norm_layer=` asks for."""
    return nn.GroupNorm(math.gcd(GROUPS, width), width)


def by_groups(module: nn.Module) -> nn.Module:
    """Put GroupNorm in the place of every BatchNorm2d, in place: no image's features depend on another's.

    The names of the weights stay; a torchvision backbone made with `norm_layer=group_norm` loads them.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                replacement = group_norm(child.num_features).to(child.weight)
                replacement.load_state_dict({"weight": child.weight, "bias": child.bias})
                setattr(parent, name, replacement)
    return module
