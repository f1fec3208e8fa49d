"""Messages between neighbours: posted ahead, each wait with an end, and a failure told in one sentence."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from locallearn._walk.trees import tensors
from locallearn.pipeline.lost import NOBODY, PipelineError
from locallearn.pipeline.messages import Form, Header, Kind

_IN_FLIGHT = 2  # messages with tensors to one neighbour


class Line:
    """Messages to or from one neighbour, one way.

    Args:
        group: the two of them, the lower one first; used for this way alone.
        me: this rank.
        peer: the other one.
        names: of all ranks, for messages.
        device: where messages lie.
        timeout: how long to wait. A rank further away from one that hangs waits a little longer, so that the rank beside it is
            the first to tell.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        me: int,
        peer: int,
        names: Sequence[str],
        device: torch.device,
        timeout: timedelta,
    ) -> None:
        self._group, self._me, self._peer, self._names, self._device = group, me, peer, names, device
        to_the_end = peer if peer < me else len(names) - 1 - peer
        self._timeout = timeout * (0.9 + 0.1 * to_the_end / len(names))
        self._form: Form | None = None

    def _wait(self, work: Any, what: str, step: int) -> None:
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            raise self._lost(what, step, error) from error

    def _lost(self, what: str, step: int, error: RuntimeError) -> PipelineError:
        return PipelineError(
            f"{self._names[self._peer]} is lost, or has not answered for {self._timeout.total_seconds():.3g} s: "
            f"{self._names[self._me]} waited for {what} in step {step} since the start "
            f"(torch says: {str(error).strip().splitlines()[0]})",
            self._peer,
        )

    def _failed(self, rank: int, what: str, step: int) -> PipelineError:
        return PipelineError(
            f"{self._names[rank]} is lost or has failed, as {self._names[self._peer]} tells: {self._names[self._me]} waited for "
            f"{what} in step {step} since the start",
            rank,
        )

    def _start(self, transfer: Callable[..., Any], buffer: Tensor, end: str, what: str, step: int) -> Any:
        try:
            return transfer(buffer, group=self._group, **{end: int(self._peer > self._me)})
        except RuntimeError as error:
            raise self._lost(what, step, error) from error


class Outbox(Line):
    """To a neighbour.

    Attributes:
        bytes: sent so far.
    """

    bytes = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._works: deque[tuple[Any, Tensor, bool]] = deque()  # what was sent last, and whether it held tensors

    def send(self, tree: Any, header: Header) -> None:
        """Sends the tensors of ``tree``, and before that its form if it is another one than before."""
        form = Form.of(tree)
        if form != self._form:
            if self._form is not None:  # what the neighbour has made room for already
                self.tell(header._replace(kind=Kind.CHANGED))
            told = torch.frombuffer(bytearray(pickle.dumps(form)), dtype=torch.uint8).to(self._device)
            self._post(torch.tensor([len(told), 0], device=self._device), header.step)
            self._post(told, header.step)
            self._form = form
        self.drain(header.step, left=_IN_FLIGHT - 1)
        sent = [tensor for tensor in tensors(tree) if not tensor.is_meta]
        self._post(form.pack(sent, header, self._device), header.step, heavy=True)

    def tell(self, header: Header) -> None:
        """Sends a header alone."""
        if self._form is None:
            self._post(torch.tensor([-header.kind, header.rank], device=self._device), header.step)
        else:
            self._post(self._form.pack([], header, self._device), header.step)

    def alarm(self, header: Header) -> None:
        """Tells of a failure, as far as that is possible."""
        try:
            self._timeout = min(self._timeout, timedelta(seconds=1))
            self.tell(header)
            self.drain(header.step)
        except RuntimeError:
            pass  # the neighbour will find out by itself

    def drain(self, step: int, left: int = 0) -> None:
        """Waits until no more than ``left`` messages with tensors are on their way."""
        while self._works and (not left or sum(heavy for *_, heavy in self._works) > left):
            self._wait(self._works.popleft()[0], _TAKEN, step)

    def _post(self, buffer: Tensor, step: int, *, heavy: bool = False) -> None:
        self._works.append((self._start(dist.isend, buffer, "group_dst", _TAKEN, step), buffer, heavy))
        self.bytes += buffer.nbytes


_TAKEN = "it to take a message"


class Inbox(Line):
    """From a neighbour."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._posted: tuple[Any, Tensor] | None = None

    def post(self, step: int) -> None:
        """Makes room for the next message, once, if it is known what that will look like."""
        if self._form is not None and self._posted is None:
            buffer = self._form.empty(self._device)
            self._posted = self._start(dist.irecv, buffer, "group_src", "a message", step), buffer

    def receive(self, what: str, step: int) -> tuple[Header, Any]:
        """The next message.

        Raises:
            PipelineError: if it does not come, or tells of a failure.
        """
        header, buffer = self._next(what, step)
        if header.kind == Kind.CHANGED:
            self._form = None
            header, buffer = self._next(what, step)
        self._check(header, Kind.TENSORS, what, step)
        assert self._form is not None
        return header, self._form.unpack(buffer)

    def drain(self, step: int) -> None:
        """Takes the message that says that nothing follows."""
        what = "the end of its messages"
        self._check(self._next(what, step)[0], Kind.FLUSHED, what, step)

    def _next(self, what: str, step: int) -> tuple[Header, Tensor]:
        if self._form is None:
            head = torch.zeros(2, dtype=torch.int64, device=self._device)
            self._wait(self._start(dist.irecv, head, "group_src", what, step), what, step)
            size, culprit = head.tolist()
            if size < 0:
                return self._unless_failed(Header(-size, step, rank=culprit), what, step), head
            told = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._wait(self._start(dist.irecv, told, "group_src", what, step), what, step)
            self._form = pickle.loads(bytes(told.tolist()))
        self.post(step)
        assert self._posted is not None
        (work, buffer), self._posted = self._posted, None
        self._wait(work, what, step)
        return self._unless_failed(Form.header(buffer), what, step), buffer

    def _unless_failed(self, header: Header, what: str, step: int) -> Header:
        if header.kind == Kind.FAILED:
            raise self._failed(self._peer if header.rank == NOBODY else header.rank, what, step)
        return header

    def _check(self, header: Header, kind: Kind, what: str, step: int) -> None:
        if header.kind != kind or header.step != step:
            raise PipelineError(
                f"ranks do different things: {self._names[self._me]} waited for {what} in step {step} since the start, and "
                f"{self._names[self._peer]} sent {Kind(header.kind).name} in step {header.step}. Call step and flush equally "
                "often on all ranks",
                self._peer,
            )
