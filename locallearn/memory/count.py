"""What a training step costs, counted exactly: FLOPs, the peak of live bytes, the peak of bytes saved for backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry
from torch.utils.weak import WeakIdKeyDictionary

import locallearn.losses._flops  # noqa: F401 - teaches torch's flop counter our operators


class Cost(NamedTuple):
    """What one call did.

    Attributes:
        flops: floating-point operations of matrix products, convolutions and attention (a multiply-add is two).
        peak_bytes: the most bytes of tensors made by the call that were alive at once.
        saved_bytes: the most bytes saved for backward that were alive at once, weights excepted.
    """

    flops: int
    peak_bytes: int
    saved_bytes: int


def measure(step: Callable[[], object]) -> Cost:
    """Runs ``step`` once and counts.

    Counts are exact and repeatable; time is not measured. Tensors that were alive before (weights, ``.grad``, optimiser
    state, the images) do not count, so run a first step before, if gradients are not to count. Runs under
    ``FakeTensorMode`` too, where a ResNet-50 at batch 64 takes seconds and no memory.

    What happens inside of a custom operator is not seen, only its inputs and outputs; InfoNCE's FLOPs are counted by their
    formulas, its temporaries (a few tiles) are not.

    Args:
        step: for example ``lambda: model.local_step(view1, view2)``.

    Example:
        >>> weight = torch.zeros(100, 100, requires_grad=True)
        >>> weight.grad = torch.zeros_like(weight)
        >>> images = torch.zeros(5, 100)
        >>> measure(lambda: (images @ weight).relu().sum().backward())
        Cost(flops=200000, peak_bytes=42008, saved_bytes=2000)
    """
    flops, live, saved = Flops(), LiveBytes(), _SavedBytes()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.pack(tensor, live.size(tensor)), saved.unpack)
    with flops, live, hooks:
        step()
    return Cost(flops.total, max(live.history), saved.peak)


class Flops(TorchDispatchMode):
    """Adds up torch's formulas. Its own FlopCounterMode hooks every module too, and so keeps alive what is recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution_backward.default:
            self.total += _convolution_backward(*args)
        elif (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def _convolution_backward(grad: Tensor, images: Tensor, weight: Tensor, *args: Any) -> int:
    """Either gradient costs what the forward did. torch's formula takes a grouped convolution's weight for a dense one."""
    transposed: bool = args[4]
    output_mask: list[bool] = args[7]
    flops = conv_flop_count(list(images.shape), list(weight.shape), list(grad.shape), transposed)
    return flops * sum(output_mask[:2])


class LiveBytes(TorchDispatchMode):
    """Follows every storage that an operator makes until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.history = [0]  # after every change
        self._sizes: Any = WeakIdKeyDictionary()  # storages made before the mode was entered count as 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        for tensor in given:
            for storage in storages(tensor):
                self._sizes.setdefault(storage, 0)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                for storage in storages(tensor):
                    if storage not in self._sizes:
                        size = self._sizes[storage] = self._bytes(tensor, storage, given)
                        self._add(size)
                        finalize(storage, self._add, -size)
        return result

    def _bytes(self, made: Tensor, storage: UntypedStorage, given: Sequence[Tensor]) -> int:
        """How many bytes ``storage`` counts for, which an operator made of ``given``."""
        return storage.nbytes()

    def size(self, tensor: Tensor) -> int:
        """The bytes behind ``tensor``, if an operator made them."""
        return sum(self._sizes.get(storage, 0) for storage in storages(tensor))

    def _add(self, size: int) -> None:
        self.history.append(self.history[-1] + size)


def storages(tensor: Tensor) -> list[UntypedStorage]:
    """What lies behind ``tensor``; behind a sparse one, as an embedding's gradient may be, that of its parts."""
    if tensor.layout is torch.strided:
        return [tensor.untyped_storage()]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices().untyped_storage(), tensor._values().untyped_storage()]
    return []


class _SavedBytes:
    """Counts every storage once for as long as some graph holds it."""

    def __init__(self) -> None:
        self.peak = 0
        self._now = 0
        self._holders: Any = WeakIdKeyDictionary()  # storage -> how many saved tensors share it

    def pack(self, tensor: Tensor, size: int) -> _Holder:
        holder = _Holder(tensor)
        for storage in storages(tensor)[-1:]:
            if not self._holders.get(storage, 0):
                self._now += size
                self.peak = max(self.peak, self._now)
            self._holders[storage] = self._holders.get(storage, 0) + 1
            finalize(holder, self._release, storage, size)
        return holder

    def unpack(self, holder: _Holder) -> Tensor:
        return holder.tensor

    def _release(self, storage: Any, size: int) -> None:
        self._holders[storage] -= 1
        if not self._holders[storage]:
            self._now -= size


class _Holder:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
