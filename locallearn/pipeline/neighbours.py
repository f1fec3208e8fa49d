"""What a rank says to the ones below and above it in a step."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from locallearn._fitting.batches import rows
from locallearn._walk.segment import Flow
from locallearn._walk.trees import mapped
from locallearn.pipeline.fit import Fitted
from locallearn.pipeline.lost import PipelineError
from locallearn.pipeline.messages import Header, Kind
from locallearn.pipeline.share import Share
from locallearn.pipeline.wire import Inbox, Outbox


class Batch(NamedTuple):
    """What a step is about, on every rank.

    Attributes:
        inputs: the backbone's batch; on the meta device where this rank does not need its numbers.
        views: how many.
        rows: of the batch, all views together; ``None`` where its tensors have no common first axis.
        targets: of the loss.
        seed: of the random numbers, or ``None``.
    """

    inputs: Any
    views: int
    rows: int | None
    targets: Any
    seed: int | None


class Messenger:
    """Outlets with what belongs to them go up, gradients come down.

    Each way over each boundary is a process group of its own, since a wait that fails breaks the whole group.

    Attributes:
        batch: of the step.
    """

    batch: Batch

    def __init__(self, fitted: Fitted, timeout: timedelta) -> None:
        self._fitted, self._step = fitted, 0
        members = dist.get_process_group_ranks(fitted.everybody)
        names = [f"rank {share.rank} ({_stages(share)})" for share in fitted.shares]
        me = fitted.share.rank

        pairs = [members[lower : lower + 2] for lower in range(len(members) - 1)]
        groups = [
            [dist.new_group(pair, timeout=timeout) for _ in range(2)] for pair in pairs
        ]  # each one made by all ranks

        def line(kind: Any, lower: int, way: int) -> Any:
            """Between ``lower`` and the rank above it."""
            if not 0 <= lower < len(pairs):
                return None
            return kind(groups[lower][way], me, lower + 1 if me == lower else lower, names, fitted.device, timeout)

        up, down = range(2)
        self._from_below: Inbox | None = line(Inbox, me - 1, up)
        self._down: Outbox | None = line(Outbox, me - 1, down)
        self._up: Outbox | None = line(Outbox, me, up)
        self._from_above: Inbox | None = line(Inbox, me, down)

    @property
    def sent(self) -> int:
        """Bytes, so far."""
        return sum(line.bytes for line in (self._up, self._down) if line is not None)

    def begin(self, step: int) -> None:
        """A new step."""
        self._step = step

    def open(self, batch: Any, views: int, targets: Any, seed: int | None) -> None:
        """On rank 0: what the step is about."""
        self.batch = Batch(batch, views, rows(batch), targets, seed)

    def receive_outlet(self) -> Any:
        """What the lowest stage reads; makes room for the next one."""
        assert self._from_below is not None
        share = self._fitted.share
        header, told = self._from_below.receive(f"the outlet of stage {share.lowest - 1}", self._step)
        self._from_below.post(self._step)
        self.batch = Batch(
            told["inputs"], told["views"], told["rows"], told["targets"], header.seed if header.seeded else None
        )
        return told["outlet"]

    def send_outlet(self, outlet: Any) -> None:
        """Up, with what the ranks above need to know of the step."""
        if self._up is None:
            return
        batch = self.batch
        told = {
            "outlet": outlet,
            "inputs": batch.inputs if self._fitted.inputs_above else mapped(lambda t: t.to("meta"), batch.inputs),
            "views": batch.views,
            "rows": batch.rows,
            "targets": batch.targets,
        }
        header = Header(Kind.TENSORS, self._step, seed=batch.seed or 0, seeded=int(batch.seed is not None))
        self._up.send(told, header)
        if self._fitted.share.from_above:
            assert self._from_above is not None
            self._from_above.post(self._step)

    def send_gradient(self, unit: int, gradients: Flow) -> None:
        """Down, one hop: of each tensor in the outlet below that has a graph."""
        assert self._down is not None
        self._down.send(gradients, Header(Kind.TENSORS, self._step, unit))

    def receive_gradient(self, unit: int, *, later: int = 0) -> Flow:
        """From above, at the outlet of the highest stage; of a step that is ``later`` ones ago."""
        assert self._from_above is not None
        share, step = self._fitted.share, self._step - later
        what = f"the gradient of unit {unit} at the outlet of stage {share.highest}"
        header, gradients = self._from_above.receive(what, step)
        assert header.unit == unit, f"unit {header.unit}'s gradient instead of {what}"
        if later or unit != share.from_above[-1]:
            self._from_above.post(step)
        received: Flow = gradients
        return received

    def drain(self, step: int) -> None:
        """Waits until all messages are through, on every rank: word of it goes up to the last one, and down again."""
        self._step = step
        end = Header(Kind.FLUSHED, step)
        if self._from_below is not None:
            self._from_below.drain(step)
        if self._up is not None:
            self._up.tell(end)
        if self._from_above is not None:
            self._from_above.drain(step)
        if self._down is not None:
            self._down.tell(end)
        for box in (self._up, self._down):
            if box is not None:
                box.drain(step)

    def alarm(self, error: BaseException) -> None:
        """Tells the neighbours that this step has failed here."""
        culprit = error.rank if isinstance(error, PipelineError) else self._fitted.share.rank
        for box in (self._up, self._down):
            if box is not None:
                box.alarm(Header(Kind.FAILED, self._step, rank=culprit))


def _stages(share: Share) -> str:
    return f"stage {share.lowest}" if share.lowest == share.highest else f"stages {share.lowest} to {share.highest}"
