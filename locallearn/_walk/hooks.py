"""Hooks that somebody has put on modules, or on every module there is."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as every


def has_hooks(*modules: nn.Module) -> bool:
    """Whether somebody looks at what goes into one of ``modules`` or comes out of it, forward or backward."""
    if every._global_forward_hooks or every._global_forward_pre_hooks or has_backward_hooks(*modules):
        return True
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def has_backward_hooks(*modules: nn.Module) -> bool:
    """Whether somebody looks at the gradients of one of ``modules``."""
    if every._global_backward_hooks or every._global_backward_pre_hooks:
        return True
    return any(module._backward_hooks or module._backward_pre_hooks for module in modules)
