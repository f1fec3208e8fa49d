"""A rank's weights and optimizer state under the names of the whole model, for torch.distributed.checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def model_state(model: nn.Module, owned: Iterable[Tensor]) -> dict[str, Tensor]:
    """What of ``model.state_dict()`` is ``owned``."""
    ours = set(owned)
    return {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items() if tensor in ours}


def load_model_state(model: nn.Module, state: dict[str, Tensor], owned: Iterable[Tensor]) -> None:
    """Copies ``state`` into what is ``owned``; other names in it are other ranks'.

    Raises:
        KeyError: if something that is owned is missing.
    """
    ours = model_state(model, owned)
    if missing := sorted(ours.keys() - state.keys()):
        raise KeyError(f"the checkpoint has no {missing[:3]} and {max(0, len(missing) - 3)} more")
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(state[name])


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """One entry for each weight and quantity, such as ``state.backbone.0.weight.exp_avg``."""
    from torch.distributed.checkpoint import state_dict as distributed  # noqa: PLC0415 - slow to import

    options = distributed.StateDictOptions(flatten_optimizer_state_dict=True)
    return distributed.get_optimizer_state_dict(model, optimizer, options=options)


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The reverse of :func:`optimizer_state`; other ranks' entries are passed over."""
    from torch.distributed.checkpoint import state_dict as distributed  # noqa: PLC0415 - slow to import

    options = distributed.StateDictOptions(flatten_optimizer_state_dict=True)
    distributed.set_optimizer_state_dict(model, optimizer, state, options=options)
