"""Submodules by the names that they had when the backbone was wrapped."""

from __future__ import annotations

from torch import nn


def submodule(backbone: nn.Module, name: str) -> nn.Module:
    """``backbone.get_submodule(name)``.

    Raises:
        ValueError: if it is gone.
    """
    try:
        return backbone.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f"{type(backbone).__name__} has no submodule {name!r} any more, as it had when it was wrapped. Wrap it again: what a "
            "LocalWrapper knows of a backbone is found then"
        ) from error
