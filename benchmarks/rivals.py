"""What a user would do instead of `LocalWrapper.local_step`, each written out plainly with torch alone.

Every function is a training step on a batch of images, of which the second half are the second views of the first. It adds
gradients to `.grad`, and keeps no more than it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from locallearn import InfoNCE, Plan


@dataclass(frozen=True)
class Net:
    """A backbone as stages of blocks, and a decoder for each unit of the plan.

    Attributes:
        stages: the blocks of each stage.
        decoders: one per unit.
        plan: which stages each unit's loss reaches.
        precision: entered around every forward, such as `partial(torch.autocast, "cpu", torch.bfloat16)`.
        criterion: the loss of two views' vectors.
    """

    stages: Sequence[Sequence[Callable[[Tensor], Tensor]]]
    decoders: Sequence[nn.Module]
    plan: Plan
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    criterion: Callable[[Tensor, Tensor], Tensor] = field(default_factory=InfoNCE)

    def stage(self, s: int, features: Tensor) -> Tensor:
        with self.precision():
            for block in self.stages[s]:
                features = block(features)
        return features

    def backbone(self, features: Tensor) -> Tensor:
        for s in range(len(self.stages)):
            features = self.stage(s, features)
        return features

    def embed(self, k: int, features: Tensor) -> Tensor:
        with self.precision():
            return self.decoders[k](features)

    def loss(self, k: int, features: Tensor) -> Tensor:
        return self.criterion(*self.embed(k, features).chunk(2))

    def weights(self, s: int) -> list[Tensor]:
        return [w for block in self.stages[s] if isinstance(block, nn.Module) for w in block.parameters()]


# ------------------------------------------------------------------------------------------------ end to end


def end_to_end(net: Net, images: Tensor) -> None:
    net.loss(-1, net.backbone(images)).backward()


def blocks_recomputed(net: Net, images: Tensor) -> None:
    """Checkpointing of every block, and of the stem. BatchNorm's statistics are updated twice."""
    end_to_end(replace(net, stages=[[_recomputed(block) for block in stage] for stage in net.stages]), images)


def stages_recomputed(net: Net, images: Tensor) -> None:
    """Checkpointing of every stage as a whole."""
    end_to_end(replace(net, stages=[[_recomputed(nn.Sequential(*stage))] for stage in net.stages]), images)


def _recomputed(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return partial(checkpoint, module, use_reentrant=False)


def offloaded(net: Net, images: Tensor) -> None:
    """Everything that is kept for backward lies in the host's memory, pinned where there is a GPU."""
    with to_host():
        loss = net.loss(-1, net.backbone(images))
    loss.backward()


def to_host() -> saved_tensors_hooks:
    """This is `save_on_cpu`. Of a fake tensor the host gets the shape alone, so that only the device's bytes are counted."""
    hooks = save_on_cpu(pin_memory=torch.cuda.is_available())

    def pack(tensor: Tensor) -> Any:
        if isinstance(tensor, FakeTensor):
            return partial(torch.empty_strided, tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        return hooks.pack_hook(tensor)

    def unpack(packed: Any) -> Tensor:
        return packed() if isinstance(packed, partial) else hooks.unpack_hook(packed)

    return saved_tensors_hooks(pack, unpack)


def gradient_caching(net: Net, images: Tensor, size: int) -> None:
    """The gradient of the whole batch from parts of `size` views, by a second forward (Gao et al., 2021, "GradCache").

    First the vectors of all views without a graph, then the loss's gradient at them, then part by part a forward with a
    graph, and its backward from there. Exact where views do not depend on each other: BatchNorm sees one part at a time.
    """
    with torch.no_grad():
        vectors = torch.cat([net.embed(-1, net.backbone(part)) for part in images.split(size)])
    vectors.requires_grad_()
    net.criterion(*vectors.chunk(2)).backward()
    assert vectors.grad is not None
    for part, gradient in zip(images.split(size), vectors.grad.split(size), strict=True):
        net.embed(-1, net.backbone(part)).backward(gradient)


# ------------------------------------------------------------------------------------------------ LoCo


def forward_per_window(net: Net, images: Tensor) -> None:
    """LoCo, the naive way: every unit runs its stages forward, so that a shared stage runs twice, and backward."""
    inlet = images
    for k, unit in enumerate(net.plan.units):
        features = above = inlet
        for s in range(unit.first, unit.last + 1):
            features = net.stage(s, features)
            if s == unit.first:
                above = features.detach()
        loss = net.loss(k, features)
        del features
        inlet = above  # the next unit begins one stage higher
        loss.backward()


def doubled_backward(net: Net, images: Tensor) -> None:
    """LoCo as in the paper: one forward, and every unit's loss backward through its stages with their weights' gradients."""
    inlets: dict[int, Tensor] = {}
    outlets: dict[int, Tensor] = {}
    features = images
    for s in range(len(net.stages)):
        inlets[s] = features.detach().requires_grad_(s > 0)
        features = outlets[s] = net.stage(s, inlets[s])
        for k, unit in enumerate(net.plan.units):
            if unit.last == s:
                gradient = _through_decoder(net, k, features)
                for t in range(s, unit.first - 1, -1):
                    again = any(other.first <= t for other in net.plan.units[k + 1 :])
                    inputs = net.weights(t) + ([inlets[t]] if t > unit.first else [])
                    torch.autograd.backward(outlets[t], gradient, retain_graph=again, inputs=inputs)
                    gradient, inlets[t].grad = inlets[t].grad, None
                    if not again:
                        del outlets[t], inlets[t]
        features = features.detach()


def by_hand(net: Net, images: Tensor) -> None:
    """LoCo as `local_step` does it, for neighbours that share one stage and without a hook or a check."""
    top = len(net.stages) - 1
    features = below = net.stage(0, images)  # `below`: the outlet whose stage waits for its last gradient
    waiting: Tensor | None = None
    for s in range(1, top + 1):
        inlet = features.detach().requires_grad_()
        features = net.stage(s, inlet)
        gradient = _through_decoder(net, s - 1, features)
        if s < top:
            (down,) = torch.autograd.grad(features, inlet, gradient, retain_graph=True)
        else:
            torch.autograd.backward(features, gradient, inputs=[*net.weights(s), inlet])
            assert inlet.grad is not None
            down = inlet.grad
        torch.autograd.backward(below, down if waiting is None else waiting + down, inputs=net.weights(s - 1))
        waiting, below = gradient, features


def _through_decoder(net: Net, k: int, outlet: Tensor) -> Tensor:
    """Trains the decoder of a unit, and returns the gradient at the outlet that it reads."""
    leaf = outlet.detach().requires_grad_()
    net.loss(k, leaf).backward()
    assert leaf.grad is not None
    return leaf.grad
