"""Which tensor of an outlet a decoder reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from locallearn._walk.trees import tensors

Which: TypeAlias = int | str | Callable[[Any], Tensor] | None


class Features:
    """Takes the tensor out of an outlet that a decoder reads.

    Args:
        which: ``None`` for the first tensor of real or complex numbers; an index of a tuple or list; the key of a mapping or
            the name of an attribute; or a callable of the outlet. An outlet of one tensor is read as it is, but by a callable.

    Raises:
        TypeError: for something else; and, when called, if there is no such tensor.

    Example:
        >>> import torch
        >>> Features(1)((torch.zeros(2, 3), torch.zeros(2, 5))).shape
        torch.Size([2, 5])
    """

    def __init__(self, which: Which = None) -> None:
        if isinstance(which, bool) or not (which is None or isinstance(which, int | str) or callable(which)):
            raise TypeError(
                "features is an index or a key of what stages return, or a callable that takes a tensor out of it, such as "
                f"features=lambda outlet: outlet[0]; got {which!r}"
            )
        self.which = which

    def __call__(self, outlet: Any) -> Tensor:
        if isinstance(outlet, Tensor) and (self.which is None or not callable(self.which)):
            return outlet
        try:
            found = self._find(outlet)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            if callable(self.which):
                raise
            raise TypeError(f"features={self.which!r} is not in {described(outlet)}") from error
        if not isinstance(found, Tensor):
            raise TypeError(
                f"features={self.which!r} takes a {type(found).__name__} out of {described(outlet)}; a decoder reads a tensor"
            )
        return found

    def _find(self, outlet: Any) -> Any:
        if self.which is None:
            return next((t for t in tensors(outlet) if t.is_floating_point() or t.is_complex()), None)
        if callable(self.which):
            return self.which(outlet)
        if isinstance(self.which, str) and not isinstance(outlet, Mapping):
            return getattr(outlet, self.which)
        return outlet[self.which]


def described(outlet: Any) -> str:
    """What an outlet is and which tensors it holds where, for messages."""
    if isinstance(outlet, Tensor):
        return f"a tensor of shape {tuple(outlet.shape)}"
    leaves, _ = tree_flatten_with_path(outlet)
    held = [f"{keystr(path)} {tuple(leaf.shape)}" for path, leaf in leaves if isinstance(leaf, Tensor)]
    return f"a {type(outlet).__name__} with the tensors {', '.join(held) or 'of its fields'}"
