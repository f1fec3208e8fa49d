"""Each weight may be stepped, and its gradient dropped, as soon as it is final: while the upper stages have yet to run."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor
from zoo import ZOO

from locallearn import LocalWrapper, Plan

OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "AdamW": partial(torch.optim.AdamW, lr=0.01),
}


def wrap(backbone: str, plan: str, checkpoint: bool) -> LocalWrapper:
    specimen = ZOO[backbone]
    plans = {
        "overlap 0": Plan.windows(3, 0),
        "overlap 1": Plan.windows(3, 1),
        "lead-in": Plan.windows(3, 1, lead_in=True),
    }
    return LocalWrapper(
        specimen.build(),
        specimen.stages[:3],
        plan=plans[plan],
        decoder=specimen.decoder,
        example=specimen.views(2)[0],
        checkpoint=checkpoint,
    )


def step_when_final(model: LocalWrapper, name: str) -> list[str]:
    """Gives every weight its own optimiser; returns the names in the order in which they are stepped."""
    names = {weight: name for name, weight in model.named_parameters()}
    optimizers = {weight: OPTIMIZERS[name]([weight]) for weight in names}
    order: list[str] = []

    def final(weight: Tensor) -> None:
        optimizers[weight].step()
        optimizers[weight].zero_grad()
        order.append(names[weight])

    for weight in names:
        weight.register_post_accumulate_grad_hook(final)
    return order


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("plan", ["overlap 0", "overlap 1", "lead-in"])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("entry", ["step", "call"])
def test_weights_are_those_of_a_plain_step(optimizer: str, plan: str, checkpoint: bool, entry: str) -> None:
    model = wrap("sequential", plan, checkpoint)
    twin = copy.deepcopy(model)
    step_when_final(model, optimizer)
    plain = OPTIMIZERS[optimizer](twin.parameters())
    for _ in range(3):
        pair, state = ZOO["sequential"].views(), torch.get_rng_state()
        if entry == "step":
            model.local_step(*pair)
        else:
            model(*pair).backward()
        torch.set_rng_state(state)
        twin.local_step(*pair)
        plain.step()
        plain.zero_grad()
    assert all(weight.grad is None for weight in model.parameters())
    for (name, ours), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12, msg=name)


def test_lower_stages_are_stepped_before_upper_ones_have_run() -> None:
    model = wrap("sequential", "overlap 1", False)
    order = step_when_final(model, "SGD")
    ran: list[int] = []
    model.backbone[2].register_forward_hook(lambda *_: ran.append(len(order)))
    model.local_step(*ZOO["sequential"].views())
    assert {name.split(".")[1] for name in order[: ran[0]] if name.startswith("backbone")} == {"0"}
    assert {name.split(".")[1] for name in order[ran[0] :] if name.startswith("backbone")} == {"1", "2"}
