"""Running a module without a trace: in eval mode, and afterwards everything is as it was."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from locallearn._walk.sameness import has_values
from locallearn._walk.segment import version
from locallearn._walk.undo import Reverted


def undisturbed(*modules: nn.Module) -> Reverted[None]:
    """Runs what is inside in eval mode, then puts back what every submodule has, and the random state.

    That is modes, buffers, weights and attributes. Frozen weights that outweigh the trained ones are not copied for that: a
    large network with small adapters may have no room for it, and a moving average is no larger than what it follows.

    Attributes are what ``self.name = value`` sets in a forward: a cache, or the weight that spectral normalisation makes
    anew each time, whose graph no one could copy. They stay where the forward has built parameters or submodules.
    """
    parts = list(dict.fromkeys(part for module in modules for part in module.modules()))
    weights = [
        weight for part in parts for weight in part._parameters.values() if weight is not None and not is_lazy(weight)
    ]
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    frozen = sum(weight.numel() for weight in weights if not weight.requires_grad)
    kept = [_Part(part, frozen=frozen <= trained) for part in parts]
    built = _built(parts)
    gpus = {t.device.index for module in modules for t in module.parameters() if t.is_cuda}
    random = torch.get_rng_state()
    on_gpus = {gpu: torch.cuda.get_rng_state(gpu) for gpu in gpus} if torch.cuda.is_available() else {}

    def quieten() -> None:
        for module in modules:
            module.eval()

    def put_back() -> None:
        attributes = _built(parts) == built
        for part in kept:
            part.put_mode_back()
        for part in kept:
            part.put_back(attributes=attributes)
        torch.set_rng_state(random)
        for gpu, state in on_gpus.items():
            torch.cuda.set_rng_state(state, gpu)

    return Reverted(quieten, put_back)


def _built(parts: list[nn.Module]) -> list[tuple[int, bool]]:
    """What is trained and what it is made of; a lazy parameter becomes another kind of object when it is known."""
    weights = [weight for part in parts for weight in part._parameters.values() if weight is not None]
    found = [(id(weight), is_lazy(weight)) for weight in weights]
    return found + [(id(child), False) for part in parts for child in part._modules.values()]


class _Part:
    """What one submodule has of its own."""

    def __init__(self, part: nn.Module, *, frozen: bool) -> None:
        self._part, self._mode = part, part.training
        self._scripted = isinstance(part, torch.jit.ScriptModule)  # whose attributes live elsewhere
        self._attributes = {} if self._scripted else dict(part.__dict__)
        self._inside = [(held, held.copy()) for held in self._attributes.values() if type(held) in _CONTAINERS]
        self._registered: list[tuple[dict[str, Any], str, Tensor, int, Tensor]] = []
        for held in (part._buffers, part._parameters):
            for name, tensor in held.items():
                if (
                    tensor is not None
                    and not is_lazy(tensor)
                    and (held is part._buffers or frozen or tensor.requires_grad)
                ):
                    self._registered.append((held, name, tensor, version(tensor), tensor.detach().clone()))

    def put_mode_back(self) -> None:
        """By ``train``, where a module may drop what it keeps for evaluation only."""
        if self._part.training != self._mode:
            self._part.train(self._mode)

    def put_back(self, *, attributes: bool) -> None:
        if attributes:
            now: dict[str, Any] = self._part.__dict__
            for name in [name for name in now if self._attributes and name not in self._attributes]:
                del now[name]
            now.update({name: value for name, value in self._attributes.items() if now.get(name, now) is not value})
            for held, before in self._inside:
                _fill(held, before)
        self._part.training = self._mode
        for held, name, tensor, before, value in self._registered:
            if not self._scripted and held.get(name) is not tensor:
                held[name] = tensor
            if version(tensor) != before or _differ(tensor, value):
                tensor.detach().copy_(value)


_CONTAINERS = (dict, OrderedDict, list, set)


def _fill(held: Any, before: Any) -> None:
    """Gives a container its content back, if it has another one; by identity, since tensors do not compare."""
    if _content(held) != _content(before):
        held.clear()
        (held.extend if isinstance(held, list) else held.update)(before)


def _content(held: Any) -> list[Any]:
    values = [*held, *held.values()] if isinstance(held, dict) else list(held)
    return sorted(map(id, values)) if isinstance(held, set) else [id(value) for value in values]


def _differ(tensor: Tensor, value: Tensor) -> bool:
    """Told by the numbers, where there are any: batch normalisation writes its statistics without a new version."""
    return has_values(tensor) and has_values(value) and not torch.equal(tensor, value)
