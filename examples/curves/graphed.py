"""A step as one CUDA graph: on a GPU the kernels of small stages are over before Python has launched the next ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from locallearn import LocalWrapper


class GraphedStep:
    """`model.local_step`, captured in its fourth call and from then on replayed; on a CPU just that, call by call.

    All batches have the shapes of the first one, and whoever takes the gradients up clears them (`set_to_none`) before the
    next call: a replay writes them, and adds to nothing.
    """

    EAGER = (
        3  # steps before the capture: libraries choose their kernels, and allocate what they keep, in the first ones
    )

    def __init__(self, model: LocalWrapper) -> None:
        self._model = model
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream() if next(model.parameters()).is_cuda else None

    def __call__(self, views: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        """Returns the losses, as `local_step` does; the next call overwrites them."""
        if self._stream is None:
            return self._model.local_step(*views, targets=labels)
        self._calls += 1
        if self._calls <= self.EAGER:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):  # a capture is on another stream than the default one, too
                losses = self._model.local_step(*views, targets=labels)
            torch.cuda.current_stream().wait_stream(self._stream)
            return losses
        if self._graph is None:
            self._capture(views, labels)
        assert self._graph is not None
        for known, given in zip(self._given, [*views] if labels is None else [*views, labels], strict=True):
            known.copy_(given)
        self._graph.replay()
        for weight, gradient in self._gradients:
            weight.grad = gradient
        return self._losses

    def _capture(self, views: Sequence[Tensor], labels: Tensor | None) -> None:
        """Notes what a step does, without doing it."""
        static = [view.clone() for view in views]
        targets = None if labels is None else labels.clone()
        self._given = static if targets is None else [*static, targets]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._losses = self._model.local_step(*static, targets=targets)
        self._gradients = [(weight, weight.grad) for weight in self._model.parameters() if weight.grad is not None]
