"""Several tensors in one: tuples, lists, dicts, dataclasses, and whatever else torch takes for a pytree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map


def mapped(function: Callable[[Any], Any], tree: Any, kind: type = Tensor) -> Any:
    """``tree`` with ``function(tensor)`` in place of each of its tensors, in order; everything else stays what it is.

    Dataclasses that nobody has registered with torch are gone through by their fields. ``kind`` is what is looked for, if not
    tensors.

    Example:
        >>> import torch
        >>> mapped(lambda tensor: tensor.shape, {"maps": [torch.zeros(2, 3)], "size": 5, "mask": None})
        {'maps': [torch.Size([2, 3])], 'size': 5, 'mask': None}
    """
    if isinstance(tree, kind):
        return function(tree)

    def leaf(value: Any) -> Any:
        if isinstance(value, kind):
            return function(value)
        if not is_dataclass(value) or isinstance(value, type):
            return value
        again = copy(value)
        for field in fields(value):
            if hasattr(value, field.name):
                object.__setattr__(again, field.name, mapped(function, getattr(value, field.name), kind))
        return again

    return tree_map(leaf, tree)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in ``tree``, in order, each once.

    Example:
        >>> import torch
        >>> mask = torch.ones(2)
        >>> len(tensors((mask, {"again": mask, "other": torch.ones(2)})))
        2
    """
    if isinstance(tree, Tensor):
        return [tree]
    found: dict[Tensor, Tensor] = {}
    mapped(lambda tensor: found.setdefault(tensor, tensor), tree)  # a tuple of some kinds is made again of tensors only
    return list(found)


def called(backbone: nn.Module, batch: Any) -> Any:
    """``backbone(batch)``; a tuple gives it several arguments, and a mapping gives them by name."""
    if isinstance(batch, tuple):
        return backbone(*batch)
    if isinstance(batch, Mapping):
        return backbone(**batch)
    return backbone(batch)
