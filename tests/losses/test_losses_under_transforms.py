"""Forward-mode derivatives and torch.func see the right loss, whatever the tile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from infonce_oracle import oracle, pairs
from torch import Tensor, func
from torch.autograd import forward_ad

from locallearn import info_nce

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # of torch.func itself
LABELS = torch.tensor([0, 1, 0, 2, 1, 0])
CASES = [
    ({"form": "nt-xent"}, {}),
    ({"form": "two-way"}, {}),
    ({"form": "one-way"}, {}),
    ({"labels": LABELS}, {}),
    ({"form": "nt-xent"}, {"tile": 3}),
    ({"form": "nt-xent", "temperature": 0.01}, {}),
]
cases = pytest.mark.parametrize(("meaning", "settings"), CASES, ids=str)


def functions(meaning: dict, settings: dict) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The loss, and the same straight from its definition."""
    return lambda *z: info_nce(*z, **meaning, **settings), lambda *z: oracle(z, **meaning).mean()


def views(seed: int = 0) -> tuple[Tensor, ...]:
    return tuple(view.detach() for view in pairs(6, 4, seed=seed))


@cases
def test_tangent_is_that_of_the_definition(meaning: dict, settings: dict) -> None:
    loss, expected = functions(meaning, settings)
    found = func.jvp(loss, views(), views(1))
    torch.testing.assert_close(found, func.jvp(expected, views(), views(1)))
    with forward_ad.dual_level():
        dual = loss(*map(forward_ad.make_dual, views(), views(1)))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, found[1])


@cases
def test_gradients_of_gradients_of_torch_func(meaning: dict, settings: dict) -> None:
    loss, expected = functions(meaning, settings)
    for transform in (func.grad, func.jacrev, func.jacfwd, func.hessian):
        torch.testing.assert_close(transform(loss)(*views()), transform(expected)(*views()))

    z0, z1 = views()

    def tangent_of_gradient(f: Callable[..., Tensor]) -> Tensor:
        return func.jvp(lambda z: func.grad(f)(z, z1), (z0,), views(1)[:1])[1]

    torch.testing.assert_close(tangent_of_gradient(loss), tangent_of_gradient(expected))


@cases
def test_vmap_is_a_loop(meaning: dict, settings: dict) -> None:
    loss, _ = functions(meaning, settings)
    many = [views(seed) for seed in range(3)]
    stacked = [torch.stack(each) for each in zip(*many, strict=True)]
    torch.testing.assert_close(func.vmap(loss)(*stacked), torch.stack([loss(*each) for each in many]))
    gradients = [func.grad(loss)(*each) for each in many]
    torch.testing.assert_close(func.vmap(func.grad(loss))(*stacked), torch.stack(gradients))


def test_temperature_and_queue_may_be_what_moves() -> None:
    query, key = views()
    queue, aim = torch.randn(2, 5, 4, dtype=torch.float64)
    temperature, step = torch.tensor([0.3, 1.0], dtype=torch.float64).unbind()
    for f, at, along in (
        (lambda t: info_nce(query, key, temperature=t), temperature, step),
        (lambda n: info_nce(query, key, negatives=n), queue, aim),
    ):
        leaf = at.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(f(leaf), leaf)
        torch.testing.assert_close(func.jvp(f, (at,), (along,))[1], (gradient * along).sum())


def test_compiled_they_are_right_too() -> None:
    torch._dynamo.reset()

    def tangent(z0: Tensor, z1: Tensor, along0: Tensor, along1: Tensor) -> Tensor:
        return func.jvp(info_nce, (z0, z1), (along0, along1))[1]

    compiled = torch.compile(tangent, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*views(), *views(1)), tangent(*views(), *views(1)))
