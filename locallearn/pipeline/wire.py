"""Messages between neighbours: posted ahead, each wait with an end, and a failure told in one sentence."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from locallearn.pipeline.messages import Form, Header, Kind

_IN_FLIGHT = 2  # messages to one neighbour


class PipelineError(RuntimeError):
    """A rank of the pipeline is lost, or hangs; every rank ends with this error.

    Attributes:
        rank: which one, as far as is known here.
    """

    def __init__(self, text: str, rank: int) -> None:
        super().__init__(text)
        self.rank = rank


class Neighbour(NamedTuple):
    """The rank at the other end.

    Attributes:
        rank: of the pipeline.
        stages: which it owns, for messages.
    """

    rank: int
    stages: str


class Line:
    """Messages to or from one neighbour, one way.

    Args:
        group: the processes, used for this line alone.
        me: this rank, in words.
        peer: the other one.
        device: where messages lie.
        timeout: how long to wait.
    """

    def __init__(
        self, group: dist.ProcessGroup, me: str, peer: Neighbour, device: torch.device, timeout: timedelta
    ) -> None:
        self._group, self._me, self._peer, self._device, self._timeout = group, me, peer, device, timeout
        self._form: Form | None = None
        self._works: deque[tuple[Any, Tensor]] = deque()

    def _wait(self, work: Any, what: str, step: int) -> None:
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            raise self._lost(what, step, str(error).strip().splitlines()[0]) from error

    def _lost(self, what: str, step: int, why: str) -> PipelineError:
        return PipelineError(
            f"rank {self._peer.rank} ({self._peer.stages}) is lost, or does not answer within {self._timeout.total_seconds():g} "
            f"s: {self._me} waited for {what} in step {step}. Start all ranks again from the last checkpoint. torch says: {why}",
            self._peer.rank,
        )

    def _start(self, transfer: Callable[..., Any], buffer: Tensor, end: str, what: str, step: int) -> Any:
        try:
            return transfer(buffer, group=self._group, **{end: self._peer.rank})
        except RuntimeError as error:
            raise self._lost(what, step, str(error).strip().splitlines()[0]) from error


class Outbox(Line):
    """To a neighbour.

    Attributes:
        bytes: sent so far.
        expected: whether the neighbour has made room for a message that has not been sent.
    """

    bytes = 0
    expected = False

    def send(self, tree: Any, header: Header, what: str) -> None:
        """Sends the tensors of ``tree``, and before that its form if it is another one than before."""
        form = Form.of(tree)
        if form != self._form:
            if self._form is not None:  # what the neighbour has made room for already
                self._post(self._form.pack([], header._replace(kind=Kind.CHANGED), self._device), header.step)
            told = torch.frombuffer(bytearray(pickle.dumps(form)), dtype=torch.uint8).to(self._device)
            self._post(torch.tensor([len(told), 0], device=self._device), header.step)
            self._post(told, header.step)
            self._form = form
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not leaf.is_meta]
        self._post(form.pack(tensors, header, self._device), header.step)
        self.expected = True

    def end(self, header: Header) -> None:
        """Says that nothing follows, if a message is expected."""
        if self.expected and self._form is not None:
            self._post(self._form.pack([], header, self._device), header.step)
            self.expected = False
        self.drain(header.step)

    def alarm(self, header: Header) -> None:
        """Tells of a failure, as far as that is possible."""
        try:
            self._timeout = min(self._timeout, timedelta(seconds=2))
            if self._form is None:
                self._post(torch.tensor([-1, header.rank], device=self._device), header.step)
            else:
                self._post(self._form.pack([], header, self._device), header.step)
            self.drain(header.step)
        except RuntimeError:
            pass  # the neighbour will find out by itself

    def drain(self, step: int) -> None:
        """Waits until everything is through."""
        while self._works:
            self._wait(self._works.popleft()[0], "what it was sent to be taken", step)

    def _post(self, buffer: Tensor, step: int) -> None:
        while len(self._works) >= _IN_FLIGHT:
            self._wait(self._works.popleft()[0], "what it was sent to be taken", step)
        self._works.append((self._start(dist.isend, buffer, "group_dst", "it to take a message", step), buffer))
        self.bytes += buffer.nbytes


class Inbox(Line):
    """From a neighbour."""

    def post(self, step: int) -> None:
        """Makes room for the next message, if it is known what that will look like."""
        if self._form is not None:
            buffer = self._form.empty(self._device)
            self._works.append((self._start(dist.irecv, buffer, "group_src", "a message", step), buffer))

    def receive(self, what: str, step: int) -> tuple[Header, Any]:
        """The next message.

        Raises:
            PipelineError: if it does not come, or tells of a failure.
        """
        header, buffer = self._next(what, step)
        if header.kind == Kind.CHANGED:
            self._learn_form(what, step)
            header, buffer = self._next(what, step)
        if header.kind != Kind.TENSORS or header.step != step:
            raise PipelineError(
                f"ranks do different things: {self._me} waited for {what} in step {step}; rank {self._peer.rank} "
                f"({self._peer.stages}) is in step {header.step} and sent {Kind(header.kind).name}. Call step and flush equally "
                "often on every rank",
                self._peer.rank,
            )
        assert self._form is not None
        return header, self._form.unpack(buffer)

    def drain(self, step: int) -> None:
        """Takes the message that says that nothing follows, if room was made for it."""
        while self._works:
            self._next("the end of the line", step)

    def _next(self, what: str, step: int) -> tuple[Header, Tensor]:
        if self._form is None:
            self._learn_form(what, step)
        if not self._works:
            self.post(step)
        work, buffer = self._works.popleft()
        self._wait(work, what, step)
        header = Form.header(buffer)
        if header.kind == Kind.FAILED:
            raise self._failed(header.rank, what, step)
        return header, buffer

    def _failed(self, rank: int, what: str, step: int) -> PipelineError:
        return PipelineError(
            f"rank {rank} is lost or has failed, as rank {self._peer.rank} ({self._peer.stages}) tells: {self._me} waited for "
            f"{what} in step {step}. Start all ranks again from the last checkpoint",
            rank,
        )

    def _learn_form(self, what: str, step: int) -> None:
        head = torch.zeros(2, dtype=torch.int64, device=self._device)
        self._wait(self._start(dist.irecv, head, "group_src", what, step), what, step)
        size, culprit = head.tolist()
        if size < 0:
            raise self._failed(culprit, what, step)
        told = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._wait(self._start(dist.irecv, told, "group_src", what, step), what, step)
        self._form = pickle.loads(bytes(told.tolist()))
