"""All that a look from outside has to leave as it was."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from locallearn import LocalWrapper


def state_of(model: LocalWrapper) -> dict[str, Any]:
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    gradients = {name: None if w.grad is None else w.grad.clone() for name, w in model.named_parameters()}
    modes = [part.training for part in model.modules()]
    hooks = [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()]
    wide = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002 - the state that everyone shares
    return {
        "tensors": tensors,
        "gradients": gradients,
        "rest": (modes, hooks, wide[1:]),
        "random": wide[0],
        "losses": model.losses,
    }


def assert_same(model: LocalWrapper, before: dict[str, Any]) -> None:
    after = state_of(model)
    for kind in ("tensors", "gradients"):
        assert before[kind].keys() == after[kind].keys()
        for name, tensor in before[kind].items():
            other = after[kind][name]
            assert (tensor is None) == (other is None), name
            assert tensor is None or torch.equal(tensor, other), name
    for one, other in zip(before["rest"], after["rest"], strict=True):
        assert one == other
    assert torch.equal(before["random"], after["random"])
    assert before["losses"] is after["losses"]
