"""Random numbers by seed and place: the same wherever a stage runs, and nobody else's stream changes."""

from __future__ import annotations

import pytest
import torch
from oracle import gradients
from torch import nn

from locallearn import LocalWrapper, MLPDecoder, fused, sequential


def build(schedule: object = sequential, checkpoint: bool = False) -> LocalWrapper:
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Tanh()) for _ in range(4)]
    decoder = lambda width: nn.Sequential(nn.Dropout(0.2), MLPDecoder(width, out_features=8))  # noqa: E731
    options = {"schedule": schedule, "checkpoint": checkpoint}
    return LocalWrapper(nn.Sequential(*stages), range(4), decoder=decoder, example=torch.rand(2, 6), **options)


def step(model: LocalWrapper, seed: int | None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.local_step(*torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(1)), seed=seed)
    return gradients(model)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_seed_fixes_a_step_and_leaves_the_stream_alone() -> None:
    model = build()
    before = torch.get_rng_state()
    once = step(model, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(100)
    assert same(step(model, 3), once)
    assert not same(step(model, 4), once)


def test_without_a_seed_the_stream_goes_on_as_ever() -> None:
    torch.manual_seed(5)
    once = step(build(), None)
    after = torch.get_rng_state()
    assert same(step(build(), None), once)  # build() seeds
    assert torch.equal(torch.get_rng_state(), after)
    assert not same(step(build(), 3), once)


def test_stages_and_units_draw_independently_of_the_order() -> None:
    """Fused, all units are trained after all stages have run; with one stream they would draw other numbers."""
    assert same(step(build(sequential), 3), step(build(fused), 3))
    assert not same(step(build(sequential), None), step(build(fused), None))


def test_what_is_recomputed_draws_the_same_again() -> None:
    plain, lean = step(build(), 3), step(build(checkpoint=nn.Sequential), 3)  # type: ignore[arg-type]
    assert all(torch.allclose(plain[name], lean[name], rtol=1e-12) for name in plain)


def test_an_error_half_way_leaves_the_stream_alone() -> None:
    model = build()
    model.loss.forward = lambda a, b: 1 / 0
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        step(model, 3)
    assert torch.equal(torch.get_rng_state(), before)
