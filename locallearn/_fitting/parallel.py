"""Which ways of spreading a model over processes fit a local pass, and what to do instead of those that do not."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from locallearn._walk.segment import leaves
from locallearn._walk.uncompiled import uncompiled
from locallearn.distributed import in_use

_WHOLE = (
    "wrap first and shard the wrapped model as a whole, fully_shard(model), then loss = model(*views); loss.backward()"
)


@uncompiled
def check_parallel(model: nn.Module, backbone: nn.Module, *, step: bool = False) -> None:
    """Refuses what trains nothing, or something else, without a word.

    Args:
        model: the wrapper; or the backbone, before it is wrapped.
        backbone: the backbone.
        step: whether this is ``local_step``.

    Raises:
        ValueError: if a part of ``model`` is sharded or averages its own gradients.
        RuntimeError: for ``local_step`` of a sharded model.
    """
    if not in_use():
        return
    if any(isinstance(part, DistributedDataParallel) for part in backbone.modules()):
        raise ValueError(
            "the backbone is, or holds, a DistributedDataParallel, which would average its own gradients but not the decoders'. "
            "Take the module inside, ddp.module, wrap that, and give the whole to it: DistributedDataParallel(LocalWrapper(...))"
        )
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # slow to import, and nobody shards without it
    if fsdp is None:
        return
    names = {part: name for name, part in model.named_modules()}
    if _flattened(model, fsdp):
        raise ValueError(
            "FullyShardedDataParallel makes one flat parameter of what it wraps, whose gradient is not final before the whole "
            "backward is; a local pass needs those of single stages. Take its successor torch.distributed.fsdp.fully_shard: "
            + _WHOLE
        )
    sharded = [name for part, name in names.items() if isinstance(part, fsdp.FSDPModule)]
    if sharded and model is backbone:
        raise ValueError(f"the backbone is sharded already ({_listed(sharded)}). Instead, {_WHOLE}")
    if sharded and step:
        raise RuntimeError(
            "local_step goes past fully_shard, which gathers weights and spreads gradients around a call of the model. Call "
            "that: loss = model(*views); loss.backward()"
        )
    if sharded not in ([], [""]):
        raise ValueError(
            f"parts of the model are sharded by themselves ({_listed(sharded)}): gradients of a local pass would be lost there, "
            f"or be one process's own. Instead, {_WHOLE}"
        )


def _flattened(model: nn.Module, fsdp: Any) -> bool:
    """Whether FullyShardedDataParallel holds ``model``, or a part of it; from inside its parameters alone tell."""

    def flat(weight: Tensor) -> bool:
        if getattr(weight, "_fsdp_flattened", False):
            return True
        return not weight.is_leaf and any(isinstance(leaf, fsdp.FlatParameter) for leaf in leaves(weight))

    return any(flat(weight) for weight in model.parameters())


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) if name else "itself" for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
