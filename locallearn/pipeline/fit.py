"""Whether a model can be divided up among ranks, and the part of one of them: all of it before the first step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from locallearn._fitting.batches import View, example_batch
from locallearn._fitting.quiet import undisturbed
from locallearn._walk.trees import mapped, tensors
from locallearn.distributed import in_use
from locallearn.losses import InfoNCE
from locallearn.pipeline.owners import Reading, reading
from locallearn.pipeline.part import Chain, OwnForward, chain
from locallearn.pipeline.share import Share, shares
from locallearn.sharing import Sharing
from locallearn.wrapper import LocalWrapper


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
    inputs_above: bool


def fit(
    model: LocalWrapper,
    ranks: Sequence[int],
    mode: str,
    group: dist.ProcessGroup | None,
    example: View | Sequence[View] | None,
) -> Fitted:
    """Checks, divides up and tries; ``model`` keeps only this rank's part.

    Raises:
        RuntimeError: if there is no process group.
        TypeError: if ``model`` is no ``LocalWrapper``.
        ValueError: on all ranks, if something does not fit on one of them.
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
    found: Fitted | Exception
    try:
        found = _fitted(model, ranks, mode, group, example)
    except Exception as error:  # noqa: BLE001 - whatever it is, all ranks have to know
        found = error
    wrong = f"{found}" if isinstance(found, Exception) else ""
    told: list[Any] = [None] * dist.get_world_size(group)
    given = (str(model.plan), model.stages, list(ranks), mode)
    needs = isinstance(found, Fitted) and found.part.needs_inputs
    dist.all_gather_object(told, (wrong, given, needs), group=group)
    problems: dict[str, list[int]] = {}
    for rank, (wrong, _, _) in enumerate(told):
        problems.setdefault(wrong, []).append(rank)
    problems.pop("", None)
    if isinstance(found, Exception) and problems == {str(found): list(range(len(told)))}:
        raise ValueError(str(found)) from found
    if problems:
        listed = "; ".join(f"on rank {', '.join(map(str, who))}: {wrong}" for wrong, who in problems.items())
        raise ValueError(f"the model cannot be divided up like this, {listed}")
    if differ := [rank for rank, (_, other, _) in enumerate(told) if other != told[0][1]]:
        raise ValueError(
            f"ranks {differ} were given other stages, another plan, ranks= or mode= than rank 0: {told[0][1]}"
        )
    assert isinstance(found, Fitted)
    above = any(needs for _, _, needs in told[found.share.rank + 1 :])
    return replace(found, inputs_above=above)


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
    behind = {tensor for tensor, stages in known.stages.items() if stages == (model.plan.stages,)}
    owned = [tensor for tensor in [*model.parameters(), *model.buffers()] if rank in owners[tensor]]
    weights = [weight for weight in model.parameters() if rank in owners[weight] and weight not in behind]
    names = [*model.named_parameters(), *model.named_buffers()]
    shared = {name: tensor for name, tensor in names if len(owners[tensor]) > 1 and rank in owners[tensor]}
    highest = [weight for weight in weights if share.highest in known.stages.get(weight, ())]
    if mode == "exact":
        _warn_of_waiting(model, share, len(every))
    device = _device(known, share, batch)
    part = _tried(model, share, known, batch, owners)
    return Fitted(share, every, part, weights, owned, highest, shared, device, inputs_above=False)


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
    kinds = [type(part).__name__ for part in model.modules() if isinstance(part, DistributedDataParallel)]
    spread = [name for name, weight in model.named_parameters() if hasattr(weight, "device_mesh")]
    if kinds or spread:
        raise ValueError(
            f"parts of the model are spread over processes already ({', '.join([*kinds, *spread][:3])}), which does not go with "
            "a pipeline yet. Give it a plain model"
        )
    for loss in model.loss.modules() if isinstance(model.loss, nn.Module) else ():
        if isinstance(loss, InfoNCE) and (loss.gather is True or loss.group is not None):
            raise ValueError(
                "InfoNCE takes other ranks' rows, which are of other stages here. Leave gather= and group= away"
            )
        if isinstance(loss, InfoNCE):
            loss.gather = False  # a rank has the whole batch


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


def _device(known: Reading, share: Share, batch: Any) -> torch.device:
    return tensors(known.outlets[share.lowest - 1] if share.lowest else batch)[0].device


def _tried(
    model: LocalWrapper, share: Share, known: Reading, batch: Any, owners: dict[Tensor, tuple[int, ...]]
) -> Chain | OwnForward:
    """This rank's part, which puts out the same as the whole backbone did; the others' numbers are dropped."""
    inlet = known.outlets[share.lowest - 1] if share.lowest else batch
    expected = known.outlets[share.highest]
    top = share.highest == len(model.stages) - 1
    to_the_end = top and any(stages == (len(model.stages),) for t, stages in known.stages.items() if _is_buffer(t))
    _drop(model, {tensor for tensor, ranks in owners.items() if share.rank not in ranks})
    part = chain(model.backbone, model.stages, share, to_the_end=to_the_end)
    if part is not None:
        return part
    own = OwnForward(model.backbone, model.stages, share, _device(known, share, batch), to_the_end=to_the_end)
    outcomes = []
    for inputs in (mapped(lambda t: t.to("meta"), batch), batch) if share.lowest else (batch,):
        outcome = _outcome(own, model, inlet, inputs, share.highest)
        if not isinstance(outcome, Exception) and _equal(outcome, expected):
            own.needs_inputs = share.lowest > 0 and inputs is batch
            return own
        outcomes.append(outcome)
    raise ValueError(
        f"{type(model.backbone).__name__} does not run by itself from the outlet of stage {share.lowest - 1} to that of stage "
        f"{share.highest}: {_told(outcomes[-1])}. What its stages need beside the outlet below and the batch has to pass the cut"
    )


def _outcome(part: OwnForward, model: LocalWrapper, inlet: Any, inputs: Any, highest: int) -> Any:
    results: list[Any] = []

    def on_outlet(stage: int, output: Any) -> Any:
        if stage == highest:
            results.append(output)
        return output

    quiet = undisturbed(model.backbone)
    try:
        with quiet, quiet, torch.no_grad():
            part.run(_copied(inputs), lambda: _copied(inlet), on_outlet)
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything
        return error
    return results[0]


def _copied(tree: Any) -> Any:
    return mapped(lambda tensor: tensor.detach().clone(), tree)


def _equal(one: Any, other: Any) -> bool:
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    return all(a.device == b.device and torch.equal(a, b) for a, b in pairs)


def _is_buffer(tensor: Tensor) -> bool:
    """Which may be changed by a forward; what lies behind the last cut runs for that alone."""
    return not isinstance(tensor, nn.Parameter)


def _told(outcome: Any) -> str:
    if isinstance(outcome, Exception):
        return f"{type(outcome).__name__}: {outcome}"
    if any(tensor.is_meta for tensor in tensors(outcome)):
        return "something else from below is needed"
    return "another outlet comes out than in the whole forward"


def _drop(model: nn.Module, tensors: set[Tensor]) -> None:
    """Puts ``tensors`` on the meta device, wherever the model has them."""
    empty: dict[Tensor, Tensor] = {}
    for held in _registries(model):
        for name, tensor in held.items():
            if tensor is not None and tensor in tensors:
                if tensor not in empty:
                    moved: Any = torch.empty_like(tensor, device="meta")
                    empty[tensor] = (
                        nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
                    )
                held[name] = empty[tensor]


def _registries(model: nn.Module) -> Iterator[dict[str, Any]]:
    for module in model.modules():
        yield module._parameters
        yield module._buffers
