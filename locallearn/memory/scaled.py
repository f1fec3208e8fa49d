"""Live bytes of many inputs, counted with two: what is computed from the inputs grows with them, the rest does not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils.weak import WeakIdKeyDictionary

from locallearn.memory.count import LiveBytes, storages


class ScaledBytes(LiveBytes):
    """As LiveBytes, as if there were ``factor`` times as many inputs.

    What an operator makes of what comes from ``inputs`` counts ``factor`` times. A weight that is standardised or a table of
    positions counts once, and so does a weight's gradient, which is as large as the weight; it is added to ``.grad`` and
    freed at once, so that it counts only at the moment when it is made.

    Args:
        inputs: what the backbone is given.
        factor: how many times as many inputs there will be.
    """

    def __init__(self, inputs: Sequence[Tensor], factor: float) -> None:
        super().__init__()
        self.factor = factor
        self._grows: Any = WeakIdKeyDictionary()
        for tensor in inputs:
            self._grows.update(dict.fromkeys(storages(tensor), True))
        self._gradients: set[tuple[int, ...]] = set()

    def expect_gradients(self, weights: Iterable[Tensor]) -> None:
        """From now on, what has the shape of one of ``weights`` (or is its transpose) is a gradient of it."""
        self._gradients = {tuple(sorted(weight.shape)) for weight in weights}

    def _bytes(self, made: Tensor, storage: UntypedStorage, given: Sequence[Tensor]) -> int:
        if not any(below in self._grows for tensor in given for below in storages(tensor)):
            return storage.nbytes()
        if made.layout is not torch.strided or tuple(sorted(made.shape)) in self._gradients:
            self._add(storage.nbytes())
            self._add(-storage.nbytes())
            return 0
        self._grows[storage] = True
        return int(storage.nbytes() * self.factor)
