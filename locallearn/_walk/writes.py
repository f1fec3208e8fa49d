"""What memory operations write to, whether a tensor's version tells it or not."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from locallearn._walk.sameness import has_values


class Writes(TorchDispatchMode):
    """Notes where operations write.

    Attributes:
        memory: the addresses of the storages.

    Example:
        >>> import torch
        >>> weight = torch.zeros(3)
        >>> with Writes() as writes:
        ...     weight.data.add_(1)
        tensor([1., 1., 1.])
        >>> weight._version, weight.untyped_storage().data_ptr() in writes.memory
        (0, True)
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.is_mutable:
            for given, argument in zip(args, func._schema.arguments, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.memory |= {t.untyped_storage().data_ptr() for t in tree_leaves(given) if has_values(t)}
        return result
