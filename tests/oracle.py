"""The gradients that a local pass must give, the slow and obvious way: one plain forward, one backward per unit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from locallearn import LocalWrapper


def oracle(model: LocalWrapper, *views: Tensor, targets: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The units' losses and every parameter's gradient, by ``torch.autograd.backward(loss_k, inputs=<unit k's weights>)``.

    Works on a deep copy, so that ``model`` stays as it was. Which weights a stage has is read off the plain graph: those
    that its outlet reaches, less those that the outlet below reaches.
    """
    model = copy.deepcopy(model)
    backbone = model.backbone
    outlets: list[Tensor] = []  # clones, since the next stage may begin with an operation in place
    ends = [backbone.get_submodule(name) for name in model.stages]
    for end in ends:  # around the whole call, hooks on its backward included
        end._compiled_call_impl = _noted(end, outlets)
    backbone(torch.cat(views))
    for end in ends:
        del end._compiled_call_impl

    stages: list[list[Tensor]] = []
    below: set[int] = set()
    for outlet in outlets:
        reached = weights_of(outlet)
        stages.append([w for w in reached if id(w) not in below])
        below |= {id(w) for w in reached}

    losses = []
    for k, unit in enumerate(model.plan.units):
        outputs = model.decoders[k](outlets[unit.last]).chunk(len(views))
        loss_k = model.loss[k] if isinstance(model.loss, nn.ModuleList) else model.loss
        loss = loss_k(*outputs) if targets is None else loss_k(*outputs, targets)
        own = {id(w): w for stage in unit.updates for w in stages[stage]}
        heads = {id(w): w for m in (model.decoders[k], loss_k) if isinstance(m, nn.Module) for w in m.parameters()}
        inputs = [w for w in {**own, **heads}.values() if w.requires_grad]
        if inputs and loss.requires_grad:
            torch.autograd.backward(loss, inputs=inputs, retain_graph=True)
        losses.append(loss.detach())
    return torch.stack(losses), gradients(model)


def _noted(end: nn.Module, outlets: list[Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = end._call_impl(*args, **kwargs)
        outlets.append(output.clone())
        return output

    return call


def weights_of(root: Tensor) -> list[Tensor]:
    """Every leaf that the graph of ``root`` reaches, found recursively."""
    found: dict[int, Tensor] = {}
    seen: set[object] = set()
    stack = [root.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        stack += [following for following, _ in node.next_functions]
    return list(found.values())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every gradient by its parameter's name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Each gradient equal, relative to the larger of its norm and 1e-6 of the largest one's."""
    assert expected, "the oracle found nothing to compare"
    floor = 1e-6 * max(g.norm().item() for g in expected.values()) or 1.0  # all zero where every ReLU is dead
    missing = {n for n in expected.keys() - ours.keys() if expected[n].norm() > 0}
    extra = {n for n in ours.keys() - expected.keys() if ours[n].norm() > 0}
    assert not missing, f"no gradient for {sorted(missing)}"
    assert not extra, f"a gradient for {sorted(extra)}, which should have none"
    wrong = {
        name: ratio
        for name, gradient in expected.items()
        if name in ours
        and not (ratio := ((ours[name] - gradient).norm() / max(gradient.norm().item(), floor)).item()) <= tolerance
    }
    assert not wrong, f"wrong gradients (relative error): {wrong}"
