"""What a rank says to the ones below and above it in a step."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from locallearn.pipeline.fit import Fitted
from locallearn.pipeline.messages import Header, Kind
from locallearn.pipeline.share import Share
from locallearn.pipeline.wire import Inbox, Neighbour, Outbox, PipelineError


class Batch(NamedTuple):
    """What a step is about, on every rank.

    Attributes:
        inputs: the backbone's batch; on the meta device where this rank does not need its numbers.
        views: how many.
        rows: of the batch, all views together.
        targets: of the loss.
        seed: of the random numbers, or ``None``.
    """

    inputs: Any
    views: int
    rows: int
    targets: Any
    seed: int | None


class Messenger:
    """Outlets with what belongs to them go up, gradients come down; each way is a process group of its own.

    Attributes:
        batch: of the step.
        group: the ranks, for what all of them do together.
    """

    batch: Batch
    group: Any

    def __init__(self, fitted: Fitted, group: dist.ProcessGroup | None, timeout: timedelta) -> None:
        share, count = fitted.share, len(fitted.shares)
        members = dist.get_process_group_ranks(group or dist.group.WORLD)
        up, down, self.group = (dist.new_group(members, timeout=timeout) for _ in range(3))
        self._fitted, self._step = fitted, 0
        me = f"rank {share.rank} ({_stages(share)})"

        def line(kind: Any, way: Any, peer: int) -> Any:
            if not 0 <= peer < count:
                return None
            return kind(way, me, Neighbour(peer, _stages(fitted.shares[peer])), fitted.device, timeout)

        self._up: Outbox | None = line(Outbox, up, share.rank + 1)
        self._from_below: Inbox | None = line(Inbox, up, share.rank - 1)
        self._down: Outbox | None = line(Outbox, down, share.rank - 1)
        self._from_above: Inbox | None = line(Inbox, down, share.rank + 1)

    @property
    def sent(self) -> int:
        """Bytes, so far."""
        return sum(line.bytes for line in (self._up, self._down) if line is not None)

    def begin(self, step: int) -> None:
        """A new step."""
        self._step = step

    def open(self, batch: Tensor, views: int, targets: Any, seed: int | None) -> None:
        """On rank 0: what the step is about."""
        self.batch = Batch(batch, views, len(batch), targets, seed)

    def receive_outlet(self) -> Tensor:
        """What the lowest stage reads; makes room for the next one."""
        assert self._from_below is not None
        share = self._fitted.share
        header, told = self._from_below.receive(f"the outlet of stage {share.lowest - 1}", self._step)
        self._from_below.post(self._step)
        self.batch = Batch(
            told["inputs"], told["views"], told["rows"], told["targets"], header.seed if header.seeded else None
        )
        outlet: Tensor = told["outlet"]
        return outlet

    def send_outlet(self, outlet: Tensor) -> None:
        """Up, with what the ranks above need to know of the step."""
        if self._up is None:
            return
        batch = self.batch
        told = {
            "outlet": outlet,
            "inputs": batch.inputs if self._fitted.inputs_above else batch.inputs.to("meta"),
            "views": batch.views,
            "rows": batch.rows,
            "targets": batch.targets,
        }
        header = Header(Kind.TENSORS, self._step, seed=batch.seed or 0, seeded=int(batch.seed is not None))
        self._up.send(told, header, f"the outlet of stage {self._fitted.share.highest}")
        if self._fitted.share.from_above:
            assert self._from_above is not None
            self._from_above.post(self._step)

    def send_gradient(self, unit: int, gradient: Tensor) -> None:
        """Down, one hop."""
        assert self._down is not None
        self._down.send(gradient, Header(Kind.TENSORS, self._step, unit), f"the gradient of unit {unit}")

    def receive_gradient(self, unit: int) -> Tensor:
        """From above, at the outlet of the highest stage."""
        assert self._from_above is not None
        share = self._fitted.share
        what = f"the gradient of unit {unit} at the outlet of stage {share.highest}"
        header, gradient = self._from_above.receive(what, self._step)
        assert header.unit == unit, f"unit {header.unit}'s gradient instead of {what}"
        if unit != share.from_above[-1]:
            self._from_above.post(self._step)
        received: Tensor = gradient
        return received

    def drain(self, step: int) -> None:
        """Waits until all messages are through."""
        if self._up is not None:
            self._up.end(Header(Kind.FLUSHED, step))
        if self._down is not None:
            self._down.drain(step)
        if self._from_below is not None:
            self._from_below.drain(step)

    def alarm(self, error: BaseException) -> None:
        """Tells the neighbours that this step has failed here."""
        culprit = error.rank if isinstance(error, PipelineError) else self._fitted.share.rank
        for box in (self._up, self._down):
            if box is not None:
                box.alarm(Header(Kind.FAILED, self._step, rank=culprit))


def _stages(share: Share) -> str:
    return f"stage {share.lowest}" if share.lowest == share.highest else f"stages {share.lowest} to {share.highest}"
