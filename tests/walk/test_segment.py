"""A segment's graph: the one detach, the walk through it, what it keeps alive."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from oracle import weights_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import ZOO

from locallearn._walk import segment as segments
from locallearn._walk.segment import Flow, Segment, cut, leaves, unchanged


def segment() -> tuple[Segment, nn.Linear]:
    layer = nn.Linear(3, 3)
    leaves, inlet = cut(torch.rand(2, 3, requires_grad=True) * 1, differentiable=True)
    return Segment(layer(inlet).relu_(), leaves), layer


def test_a_cut_is_a_detach_that_may_be_changed_in_place() -> None:
    outlet = torch.rand(3, requires_grad=True) * 2
    (leaf,), handed_on = cut(outlet, differentiable=True)
    assert leaf.is_leaf
    assert handed_on.data_ptr() == leaf.data_ptr() == outlet.data_ptr()
    (gradient,) = torch.autograd.grad(handed_on.mul_(3).sum(), leaf)
    torch.testing.assert_close(gradient, torch.full((3,), 3.0))


@pytest.mark.parametrize(("requires", "differentiable"), [(True, False), (False, True)])
def test_a_cut_that_nobody_asks_a_gradient_of_has_no_leaf(requires: bool, differentiable: bool) -> None:
    begins, handed_on = cut(torch.rand(3, requires_grad=requires) * 1, differentiable=differentiable)
    assert not begins
    assert not handed_on.requires_grad


@pytest.mark.parametrize("name", ZOO)
def test_leaves_are_the_weights_that_a_forward_used(name: str) -> None:
    specimen = ZOO[name]
    output = specimen.build()(specimen.views(2)[0])
    assert {id(leaf) for leaf in leaves(output)} == {id(weight) for weight in weights_of(output)}


def test_leaves_of_a_leaf_and_of_a_constant() -> None:
    leaf = torch.rand(2, requires_grad=True)
    assert leaves(leaf)[0] is leaf
    assert leaves(torch.rand(2)) == []


def test_leaves_refuses_reentrant_checkpointing() -> None:
    inlet = torch.rand(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        leaves(checkpoint(nn.Linear(3, 3), inlet, use_reentrant=True))


def test_pulling_gives_the_inlets_gradient_and_none_to_weights() -> None:
    part, layer = segment()
    gradient = torch.rand(2, 3)
    expected = torch.autograd.grad(part.outlet, part.inlets, gradient, retain_graph=True)[0]  # type: ignore[arg-type]
    (ours,) = part.pull([gradient.clone()], retain=True)
    torch.testing.assert_close(ours, expected)
    assert layer.weight.grad is None
    part.pull([gradient], retain=False)
    with pytest.raises(RuntimeError, match="second time"):
        part.pull([gradient], retain=False)


@pytest.mark.parametrize("small", [0, 2**16])
def test_the_walk_lets_go_of_a_large_gradient_while_it_runs(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensor in the box is dead before the stage's first operation gets its turn."""
    monkeypatch.setattr(segments, "SMALL", small)
    alive: list[bool] = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
            alive.append(watched() is not None)
            return gradient

    begins, inlet = cut(torch.rand(2, 3, requires_grad=True) * 1, differentiable=True)
    part = Segment(nn.Linear(3, 3)(Watch.apply(inlet)), begins)
    box: Flow = [torch.rand(2, 3)]
    watched = weakref.ref(box[0])
    part.pull(box, retain=False)
    assert alive == [small > 0]
    assert box == []


def test_a_dropped_segment_frees_its_graph_without_the_collector() -> None:
    gc.disable()
    part, _ = segment()
    outlet = weakref.ref(part.outlet)
    part.pull([torch.rand(2, 3)], retain=True)
    del part
    gc.enable()
    assert outlet() is None


def test_changes_in_place_are_noticed() -> None:
    part, _ = segment()
    assert not part.changed()
    part.outlet.detach().add_(1)
    assert part.changed()
    with pytest.raises(RuntimeError, match="someone changes the outlet"), unchanged(part.outlet, "someone"):
        part.outlet.detach().add_(1)
