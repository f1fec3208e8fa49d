"""Sinks: into .grad at once, or aside until a backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from locallearn._walk import gradients as _gradients
from locallearn._walk.gradients import Accumulate, Collect


def weights() -> tuple[Tensor, Tensor, Tensor]:
    """Two weights and an inlet."""
    return tuple(torch.tensor(value, requires_grad=True) for value in (2.0, 3.0, 5.0))  # type: ignore[return-value]


@pytest.mark.parametrize("accumulator", [Accumulate(), Collect()])
def test_pushing_returns_the_inlets_gradient_and_leaves_none_on_it(accumulator: Accumulate | Collect) -> None:
    a, b, inlet = weights()
    (gradient,) = accumulator.push([a * b * inlet], [a, b], [inlet])
    assert gradient.item() == 6
    assert inlet.grad is None


@pytest.mark.parametrize("accumulator", [Accumulate(), Collect()])
def test_pushing_with_nothing_to_train_does_nothing(accumulator: Accumulate | Collect) -> None:
    a, _, inlet = weights()
    assert accumulator.push([a * 2], [], ()) == []
    assert accumulator.push([a * 2], [a], [inlet]) == []  # the root does not depend on the inlet


def test_accumulate_adds_to_grad() -> None:
    a, b, _ = weights()
    for _ in range(2):
        Accumulate().push([a * b], [a, b], ())
    assert (a.grad.item(), b.grad.item()) == (6, 4)  # type: ignore[union-attr]


def test_collect_hands_over_in_backward_times_the_incoming_over_the_scale() -> None:
    a, b, _ = weights()
    accumulator = Collect()
    accumulator.push([a * b], [a, b], ())
    accumulator.push([a * 10], [a], ())
    total = accumulator.deliver(torch.tensor(7.0), 4.0, [a, b])
    assert (total.item(), a.grad, b.grad) == (7, None, None)
    (total * 2).backward()
    assert (a.grad.item(), b.grad.item()) == (13 * 2 / 4, 2 * 2 / 4)  # type: ignore[attr-defined]


@pytest.mark.parametrize("processes", [False, True])
def test_weights_without_a_gradient_are_inputs_where_processes_wait_for_them_and_stay_without(
    processes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_gradients, "in_use", lambda: processes)
    a, b, _ = weights()
    accumulator = Collect()
    accumulator.push([a * 1], [a], ())
    total = accumulator.deliver(torch.tensor(0.0), 1.0, [a, b])
    inputs = {node.variable for node, _ in total.grad_fn.next_functions if node}  # type: ignore[union-attr]
    assert inputs == ({a, b} if processes else {a})
    total.backward()
    assert b.grad is None


def test_weights_that_were_frozen_after_the_pass_get_nothing() -> None:
    a, b, _ = weights()
    accumulator = Collect()
    accumulator.push([a * b], [a, b], ())
    total = accumulator.deliver(torch.tensor(0.0), 1.0, [a, b])
    a.requires_grad_(False)
    total.backward()
    assert b.grad.item() == 2  # type: ignore[union-attr]


def test_two_weights_with_one_gradient_tensor_are_scaled_once_each() -> None:
    a, b, _ = (weight[None] for weight in weights())
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    accumulator = Collect()
    accumulator.push([(a + b).sum()], [a, b], ())
    accumulator.deliver(torch.tensor(0.0), 1.0, [a, b]).mul(3).backward()
    assert (a.grad.item(), b.grad.item()) == (3, 3)  # type: ignore[union-attr]


def test_hooks_of_weights_wait_for_backward() -> None:
    a, _, _ = weights()
    seen: list[float] = []
    a.register_hook(lambda gradient: seen.append(gradient.item()))
    accumulator = Collect()
    accumulator.push([a * 4], [a], ())
    total = accumulator.deliver(torch.tensor(0.0), 1.0, [a])
    assert seen == []
    total.backward()
    assert seen == [4]
