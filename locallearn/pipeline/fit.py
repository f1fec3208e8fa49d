"""Whether a model can be divided up among ranks, and the part of one of them: all of it before the first step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from locallearn._fitting.batches import View, example_batch
from locallearn.distributed import in_use
from locallearn.losses import InfoNCE
from locallearn.losses._checks import APART
from locallearn.pipeline.lost import together
from locallearn.pipeline.owners import Reading, reading
from locallearn.pipeline.part import Chain, OwnForward
from locallearn.pipeline.share import Share, shares
from locallearn.pipeline.trial import device_of, tried
from locallearn.sharing import Sharing
from locallearn.wrapper import LocalWrapper

Made = TypeVar("Made", bound=torch.optim.Optimizer)


@dataclass(frozen=True)
class Fitted:
    """What a rank knows of itself and the others.

    Attributes:
        share: its own.
        shares: everybody's.
        part: runs its stages.
        weights: its parameters, without those behind the last cut.
        owned: all that it holds, buffers too.
        highest: the weights of its highest stage.
        shared: by name, what other ranks hold as well, since their stages read it.
        device: where its inlet and its outlet lie.
        everybody: the ranks, for what all of them do together; none waits there longer than the timeout.
        inputs_above: whether a rank above needs the backbone's batch.
    """

    share: Share
    shares: list[Share]
    part: Chain | OwnForward
    weights: list[nn.Parameter]
    owned: list[Tensor]
    highest: list[nn.Parameter]
    shared: dict[str, Tensor]
    device: torch.device
    everybody: Any
    inputs_above: bool


def fit(
    model: LocalWrapper,
    ranks: Sequence[int],
    mode: str,
    group: dist.ProcessGroup | None,
    example: View | Sequence[View] | None,
    optimizer: Callable[[list[nn.Parameter]], Made],
    timeout: timedelta,
) -> tuple[Fitted, Made]:
    """Checks, divides up and tries; ``model`` keeps only this rank's part, for which an optimizer is made.

    Raises:
        RuntimeError: if there is no process group.
        TypeError: if ``model`` is no ``LocalWrapper``.
        ValueError: on all ranks, if something does not fit on one of them.
        PipelineError: if a rank does not come.
    """
    if not in_use():
        raise RuntimeError(
            "a pipeline needs several processes: start them by torchrun --nproc-per-node, and call "
            "torch.distributed.init_process_group() first"
        )
    if isinstance(model, DistributedDataParallel):
        raise TypeError("data parallel and pipeline do not go together yet; give the LocalWrapper itself, model.module")
    if not isinstance(model, LocalWrapper):
        raise TypeError(f"a Pipeline divides up a LocalWrapper; got {type(model).__name__}")
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    everybody: Any = together(lambda: dist.new_group(members, timeout=timeout), "to build the pipeline", timeout)
    tensors_of = [(n, tuple(t.shape), str(t.dtype)) for n, t in [*model.named_parameters(), *model.named_buffers()]]
    given = (str(model.plan), model.stages, list(ranks), mode)
    found: tuple[Fitted, Made] | Exception
    try:
        fitted = replace(_fitted(model, ranks, mode, group, example), everybody=everybody)
        found = fitted, _made(optimizer, fitted)
    except Exception as error:  # noqa: BLE001 - whatever it is, all ranks have to know
        found = error
    wrong = f"{found}" if isinstance(found, Exception) else ""
    told: list[Any] = [None] * len(members)
    needs = not isinstance(found, Exception) and found[0].part.needs_inputs
    said = wrong, given, needs, tensors_of
    together(lambda: dist.all_gather_object(told, said, group=everybody), "to build the pipeline", timeout)
    problems: dict[str, list[int]] = {}
    for rank, (wrong, *_) in enumerate(told):
        problems.setdefault(wrong, []).append(rank)
    problems.pop("", None)
    if isinstance(found, Exception) and problems == {str(found): list(range(len(told)))}:
        raise ValueError(str(found)) from found
    if problems:
        listed = "; ".join(f"on rank {', '.join(map(str, who))}: {wrong}" for wrong, who in problems.items())
        raise ValueError(f"the model cannot be divided up like this, {listed}")
    if differ := [rank for rank, (_, other, *_) in enumerate(told) if other != told[0][1]]:
        raise ValueError(
            f"ranks {differ} were given other stages, another plan, ranks= or mode= than rank 0: {told[0][1]}"
        )
    if differ := [rank for rank, (*_, other) in enumerate(told) if other != told[0][3]]:
        first = next(pair for pair in zip_longest(told[0][3], told[differ[0]][3]) if pair[0] != pair[1])
        raise ValueError(
            f"ranks {differ} have built another model than rank 0: {first[0]} there, {first[1]} on rank {differ[0]}. Build it "
            "alike on all ranks"
        )
    assert not isinstance(found, Exception)
    above = any(needs for _, _, needs, _ in told[found[0].share.rank + 1 :])
    return replace(found[0], inputs_above=above), found[1]


def _made(optimizer: Callable[[list[nn.Parameter]], Made], fitted: Fitted) -> Made:
    """The optimizer of this rank's weights.

    Raises:
        ValueError: if there are none, or it does not take them.
    """
    if not fitted.weights:
        raise ValueError(
            f"rank {fitted.share.rank} has no weights for its optimizer; give it a stage or a decoder that is trained"
        )
    try:
        made = optimizer(fitted.weights)
    except Exception as error:
        raise ValueError(f"optimizer= fails: {type(error).__name__}: {error}") from error
    if not isinstance(made, torch.optim.Optimizer):
        raise ValueError(f"optimizer= makes a torch.optim.Optimizer of the weights that it is given; got {made!r}")
    ours = set(fitted.weights)
    if any(weight not in ours for group in made.param_groups for weight in group["params"]):
        raise ValueError("optimizer= has other weights than those that it is given, which are this rank's")
    return made


def _fitted(model: LocalWrapper, ranks: Sequence[int], mode: str, group: Any, example: Any) -> Fitted:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if len(ranks) != size:
        raise ValueError(f"ranks says how many stages each process owns; got {list(ranks)} for {size} processes")
    every = shares(model.plan, ranks)
    share = every[rank]
    _check(model, mode, every, group)
    batch = example_batch(model.backbone, example)
    known = reading(model.backbone, model.stages, batch)
    owners = _owners(model, known, every)
    updated = {stage for unit in model.plan.units for stage in unit.updates}
    left_out = {
        tensor for tensor, stages in known.stages.items() if not updated.intersection(stages)
    }  # no unit trains them
    owned = [tensor for tensor in [*model.parameters(), *model.buffers()] if rank in owners[tensor]]
    weights = [weight for weight in model.parameters() if rank in owners[weight] and weight not in left_out]
    names = [*model.named_parameters(), *model.named_buffers()]
    shared = {name: tensor for name, tensor in names if len(owners[tensor]) > 1 and rank in owners[tensor]}
    highest = [weight for weight in weights if share.highest in known.stages.get(weight, ())]
    if mode == "exact":
        _warn_of_waiting(model, share, len(every))
    device = device_of(known, share, batch)
    part = tried(model, share, known, batch, owners)
    return Fitted(share, every, part, weights, owned, highest, shared, device, everybody=None, inputs_above=False)


def _warn_of_waiting(model: LocalWrapper, share: Share, ranks: int) -> None:
    overlap = max(unit.last - unit.lowest for unit in model.plan.units)
    if overlap and ranks > 1 and len(share.stages) <= overlap:
        warnings.warn(
            f"rank {share.rank} has {len(share.stages)} of the stages; with overlap {overlap} it needs {overlap + 1} to have "
            "units of its own to train while it waits for others. Cut the backbone into more stages"
            + (", or see mode='eager'" if overlap == 1 else ""),
            stacklevel=5,
        )


def _check(model: LocalWrapper, mode: str, every: Sequence[Share], group: dist.ProcessGroup | None) -> None:
    if mode not in ("exact", "eager"):
        raise ValueError(f"mode is 'exact' or 'eager'; got {mode!r}")
    for share in every if mode == "eager" else ():
        if len(share.from_above) > 1 or any(model.plan.units[k].lowest < share.highest for k in share.from_above):
            raise ValueError(
                f"in eager mode one unit spans a boundary, by the stage below it alone, as with overlap=1; over that above stage "
                f"{share.highest} go the units {list(share.from_above)}. Take mode='exact', which does any plan"
            )
    if dist.get_world_size(group) < dist.get_world_size():
        raise ValueError(
            "a pipeline on some of the processes leaves others to a second one, and nothing would average between the two: data "
            "parallel times pipeline is not there yet. Start as many processes as ranks= has entries"
        )
    if type(model.sharing).penalty is not Sharing.penalty:
        raise ValueError(
            f"the penalty of {type(model.sharing).__name__} ties stages of several ranks together. Take Hard() or UpperOnly()"
        )
    if model._runs:
        raise ValueError(
            "checkpoint= does not go with a pipeline yet. Use torch.utils.checkpoint(..., use_reentrant=False) inside of blocks"
        )
    if model.schedule is not (LocalWrapper.__init__.__kwdefaults__ or {})["schedule"]:
        raise ValueError("a pipeline has an order of its own, and takes no schedule=; leave it away")
    kinds = [type(part).__name__ for part in model.modules() if isinstance(part, DistributedDataParallel)]
    spread = [name for name, weight in model.named_parameters() if hasattr(weight, "device_mesh")]
    if kinds or spread:
        raise ValueError(
            f"parts of the model are spread over processes already ({', '.join([*kinds, *spread][:3])}), which does not go with "
            "a pipeline yet. Give it a plain model"
        )
    for loss in model.loss.modules() if isinstance(model.loss, nn.Module) else ():
        if isinstance(loss, InfoNCE) and (loss.gather is True or loss.group is not None):
            raise ValueError(APART)


def _owners(model: LocalWrapper, known: Reading, every: Sequence[Share]) -> dict[Tensor, tuple[int, ...]]:
    """The ranks that hold each weight and buffer; the first of them has it in its ``state_dict``.

    Raises:
        ValueError: if something trained, or the state of a loss, would be on several ranks.
    """
    of_stage = [share.rank for share in every for _ in share.stages]
    of_stage.append(every[-1].rank)  # behind the last cut
    owners = {tensor: tuple(sorted({of_stage[s] for s in stages})) for tensor, stages in known.stages.items()}
    of_unit = {k: share.rank for share in every for k in share.units}
    names = {tensor: name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    for k, rank in of_unit.items():
        loss = model.loss[k] if isinstance(model.loss, nn.ModuleList) else model.loss
        for part in (model.decoders[k], loss):
            for tensor in [*part.parameters(), *part.buffers()] if isinstance(part, nn.Module) else ():
                owners[tensor] = tuple(sorted({*owners.get(tensor, ()), rank}))
                if len(owners[tensor]) > 1:
                    raise ValueError(
                        f"{names[tensor]!r}, of a decoder or a loss, is used by units of ranks {list(owners[tensor])}. Give each "
                        "unit a decoder and a loss of its own, as a list of modules, or put those that share one on one rank"
                    )
    for tensor, ranks in owners.items():
        if len(ranks) > 1 and tensor.requires_grad:
            raise ValueError(
                f"{names[tensor]!r} is trained by stages of ranks {list(ranks)}; put them on one rank, or freeze it"
            )
    return owners
