"""Gradients that are averaged over processes as soon as they are final, while the step goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from locallearn.distributed.averages import Flight, average_gradients, local_part, spread

_LEAST, _MOST = 2**20, 25 * 2**20  # bytes of a message: what is worth one, and DistributedDataParallel's


class StageReducer:
    """What the processes of each group have agreed on: which gradients travel together, and in which order.

    In the first step they all wait for its end. There the ranks agree on the order in which weights became final; from then
    on a message leaves as soon as all of its gradients, and all messages before it, are there. Whatever was not final when
    it was expected goes at the end, so the order is a matter of time and never of what comes out.

    Copies and pickles of it know nothing.
    """

    def __init__(self) -> None:
        self._agreed: dict[Any, list[list[int]]] = {}

    def __reduce__(self) -> tuple[type[StageReducer], tuple[()]]:
        return StageReducer, ()

    def step(self, weights: Iterable[Tensor], group: dist.ProcessGroup) -> Reduction:
        """A new step's gradients of ``weights``, all those of a model.

        Raises:
            ValueError: if the ranks begin with different weights, or if a DTensor has parts inside and outside of ``group``.
            RuntimeError: if a weight has hooks that run when its gradient is accumulated, before it is averaged.
        """
        kept = [weight for weight in weights if weight.requires_grad and not spread(weight, group)]
        if hooked := [tuple(w.shape) for w in kept if getattr(w, "_post_accumulate_grad_hooks", None)]:
            raise RuntimeError(
                f"{len(hooked)} weights, the first of shape {hooked[0]}, have hooks by register_post_accumulate_grad_hook, which "
                "would run on gradients that are not averaged yet. Leave group= away and average in the hooks, or step the "
                "optimizer after local_step"
            )
        key = (group, tuple((tuple(w.shape), w.dtype, w.device) for w in kept))
        if key not in self._agreed:
            _check_equal(kept, group)
        return Reduction(kept, group, self._agreed, key)


class Reduction:
    """One step's gradients on their way."""

    def __init__(
        self, weights: list[Tensor], group: dist.ProcessGroup, agreed: dict[Any, list[list[int]]], key: object
    ) -> None:
        self._weights, self._group, self._agreed, self._key = weights, group, agreed, key
        self._index = {weight: at for at, weight in enumerate(weights)}
        self._messages = agreed.get(key)
        self._final: list[list[int]] = []  # as they came, those of one backward together
        self._done: set[int] = set()
        self._flights: list[Flight] = []

    def final(self, weights: Sequence[Tensor]) -> None:
        """Nothing is added to the gradients of ``weights`` any more, unless it was so in the first step."""
        now = [self._index[weight] for weight in weights if weight in self._index]
        if self._messages is None:
            self._final.append(now)
            return
        left = {at for message in self._messages[: len(self._flights)] for at in message}
        if late := left.intersection(now):
            raise RuntimeError(
                f"{len(late)} weights, one of shape {tuple(self._weights[late.pop()].shape)}, got another gradient after theirs "
                "had been sent to the other processes, which they did not in the first step. Leave group= away, and call "
                "locallearn.distributed.average_gradients(model.parameters()) after local_step"
            )
        self._done.update(now)
        while len(self._flights) < len(self._messages) and self._done.issuperset(self._messages[len(self._flights)]):
            self._send()

    def finish(self) -> None:
        """Sends what is left and waits for all."""
        if self._messages is None:
            self._agreed[self._key] = self._agree()
            average_gradients(self._weights, self._group)
            return
        while len(self._flights) < len(self._messages):
            self._send()
        sent = {at for message in self._messages for at in message}
        average_gradients([weight for at, weight in enumerate(self._weights) if at not in sent], self._group)
        for flight in self._flights:
            flight.land()

    def _send(self) -> None:
        assert self._messages is not None
        self._flights.append(Flight([self._weights[at] for at in self._messages[len(self._flights)]], self._group))

    def _agree(self) -> list[list[int]]:
        """The messages, from what each rank saw: weights that got their whole gradient in one backward, and dense."""
        sparse = [at for at, w in enumerate(self._weights) if w.grad is not None and w.grad.is_sparse]
        seen: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(seen, (self._final, sparse), group=self._group)
        apart = {at for _, sparse in seen for at in sparse}
        for final, _ in seen:
            apart |= {at for at, times in Counter(chain.from_iterable(final)).items() if times > 1}
        messages: list[list[int]] = []
        known = set(apart)
        for final, _ in seen:
            for together in final:
                new = [at for at in dict.fromkeys(together) if at not in known]
                known.update(new)
                self._pack(messages, new)
        return messages

    def _pack(self, messages: list[list[int]], new: Sequence[int]) -> None:
        """Puts weights into the last message while that is small, and into new ones."""

        def kind(at: int) -> tuple[str, str]:
            return str(self._weights[at].device), str(self._weights[at].dtype)

        for _, alike in groupby(sorted(new, key=kind), key=kind):
            limit = _LEAST
            for at in alike:
                if not messages or self._size(messages[-1]) >= limit or kind(messages[-1][0]) != kind(at):
                    messages.append([])
                    limit = _MOST
                messages[-1].append(at)

    def _size(self, message: Sequence[int]) -> int:
        return sum(self._weights[at].nbytes for at in message)


def _check_equal(weights: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    with torch.no_grad():
        sums = [[float(part) for part in (_wide(w).sum(), _wide(w).abs().sum())] for w in weights]
    mine = [(tuple(w.shape), str(w.dtype)) for w in weights]
    seen: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(seen, (mine, sums), group=group)
    for rank, (theirs, other) in enumerate(seen):
        if theirs != seen[0][0]:
            raise ValueError(
                f"the processes train different weights: rank 0 of the group has {len(seen[0][0])} tensors, rank {rank} "
                f"{len(theirs)}, and not all of them are alike. Build and freeze the same model in each"
            )
        differ = [at for at, (a, b) in enumerate(zip(seen[0][1], other, strict=True)) if abs(a[0] - b[0]) > 1e-9 * a[1]]
        if differ:
            raise ValueError(
                f"the processes begin with different weights: of {len(mine)} tensors, {len(differ)} differ between ranks 0 and "
                f"{rank} of the group, the first of shape {mine[differ[0]][0]}. Build the model after torch.manual_seed(0) in "
                "each, load the same state_dict, or send rank 0's: for t in model.state_dict().values(): "
                "torch.distributed.broadcast(t, 0)"
            )


def _wide(weight: Tensor) -> Tensor:
    part = local_part(weight)
    return (torch.view_as_real(part) if part.is_complex() else part).double()
