"""Pipeline: the stages of one model on several processes, with the gradients of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from locallearn._fitting.attach import FromOutlet
from locallearn._fitting.batches import View, concatenated
from locallearn._fitting.objective import unit_loss
from locallearn._fitting.outlets import check_rows
from locallearn._walk.draws import draws
from locallearn._walk.gradients import Accumulate
from locallearn._walk.isolation import Isolation
from locallearn._walk.segment import version
from locallearn.distributed import apart
from locallearn.pipeline.fit import Fitted, fit
from locallearn.pipeline.late import Late, copied, swapped
from locallearn.pipeline.lost import together
from locallearn.pipeline.neighbours import Messenger
from locallearn.pipeline.norms import total_norm
from locallearn.pipeline.rank_pass import RankPass, autocast_off
from locallearn.pipeline.state import load_model_state, load_optimizer_state, model_state, optimizer_state
from locallearn.wrapper import LocalWrapper

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Pipeline:
    """Trains ``model`` on several processes, each of which owns a run of neighbouring stages, as one process would.

    Down the line go detached outlets. Over a boundary that a unit spans, one gradient comes back, one hop. Every stage sees
    the whole batch: there are no micro-batches, and BatchNorm, InfoNCE and dropout are those of one process. After each step
    the weights are what :meth:`LocalWrapper.local_step` and the optimizer would have made of them.

    A stage may begin the next batch when the units above it have been trained on this one, and meanwhile the rank has units
    of its own to train: with overlap o and at least o + 1 stages a rank nobody waits for long, and nothing has to be flushed.

    ``model`` is used up: every process builds the whole of it, and keeps its own part; the weights of others go to the meta
    device.

    Args:
        model: a wrapped backbone, built alike on every rank, on the rank's own device.
        ranks: how many stages each rank owns, from bottom to top.
        optimizer: makes an optimizer from a list of parameters, those of the rank:
            ``lambda weights: torch.optim.SGD(weights, lr=0.1)``.
        mode: ``"exact"``, or ``"eager"`` for one stage a rank or slow links, with overlap 1. There nobody waits for a gradient
            from above: that of a rank's highest stage, if a unit above shares it, is taken at the weights of its forward, of
            which one copy is kept, and applied one step later. In the first step its ``.grad`` is ``None``; :meth:`flush`
            applies the last one alone. Buffers and all other weights are not delayed. This is another method than one
            process's. On handwritten digits (``examples/pipeline.py``, three seeds) it ended 2.1 ± 2.6 points lower with two
            stages on each of two ranks, and 1.2 ± 5.6 with one stage on each of four.
        group: the processes; all of them by default.
        example: a batch that the backbone takes, as for ``LocalWrapper``; one step is tried on it here.
        timeout: how long a rank waits for another one. Then all end with :class:`PipelineError`.

    Attributes:
        model: this rank's part of the model, under the names of the whole.
        optimizer: this rank's.
        rank: this process's place in the line.
        stages: the names of the submodules after which this rank's stages end.
        units: the units whose losses this rank computes.
        losses: theirs in the last step, detached.

    Raises:
        TypeError: if ``model`` is no ``LocalWrapper``.
        ValueError: on every rank, if the model cannot be divided up in this way on any of them.
    """

    losses: Tensor | None

    def __init__(
        self,
        model: LocalWrapper,
        ranks: Sequence[int],
        optimizer: Optimizer,
        *,
        mode: Literal["exact", "eager"] = "exact",
        group: dist.ProcessGroup | None = None,
        example: View | Sequence[View] | None = None,
        timeout: timedelta = timedelta(minutes=5),
    ) -> None:
        self._fitted: Fitted
        self._fitted, self.optimizer = fit(model, ranks, mode, group, example, optimizer, timeout)
        self._timeout = timeout
        self._messenger = together(lambda: Messenger(self._fitted, timeout), "to build the pipeline", timeout)
        share = self._fitted.share
        self.model, self.rank = model, share.rank
        self.stages, self.units = model.stages[share.lowest : share.highest + 1], share.units
        self._step = 0
        self._mode = mode
        self._late: Late | None = None
        self.losses = None

    def local_step(self, *views: View, targets: Any = None, seed: int | None = None) -> Tensor:
        """One batch: gradients are added to the ``.grad`` of this rank's weights, and the optimizer is left alone.

        Called by all ranks. What the batch is, rank 0 says; the others may be given the same, or nothing.

        Args:
            views: as for :meth:`LocalWrapper.local_step`.
            targets: likewise.
            seed: likewise.

        Returns:
            the losses of this rank's units, detached.

        Raises:
            PipelineError: if another rank is lost, or does not answer.
            RuntimeError: without gradients, or under fp16 autocast.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("a pipeline trains, and gradients are disabled here")
        kind = self._fitted.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
            raise RuntimeError("fp16 needs one loss scale on all ranks, which a pipeline has not; take bf16 autocast")
        messenger, share = self._messenger, self._fitted.share
        messenger.begin(self._step)
        with self._alarmed():
            if share.rank == 0:
                inlet = concatenated(views)
                messenger.open(inlet, len(views), targets, seed)
            else:
                inlet = messenger.receive_outlet()
            self.losses = self._pass(inlet)
        self._step += 1
        return self.losses

    def step(self, *views: View, targets: Any = None, seed: int | None = None) -> Tensor:
        """:meth:`local_step`, then the optimizer's step, and gradients set to ``None``."""
        losses = self.local_step(*views, targets=targets, seed=seed)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses

    def flush(self) -> None:
        """Waits for all ranks to come here, with every message through. Called by all, in the end and before a checkpoint.

        In eager mode the optimizer applies the last gradient of the highest stage, and nothing else.

        Raises:
            PipelineError: if another rank is lost, or does not answer.
        """
        with self._alarmed():
            if self._late is not None:
                aside = {weight: weight.grad for weight in self._fitted.weights}
                self.optimizer.zero_grad()
                self._finish(self._late)
                self._late = None
                self.optimizer.step()
                for weight, gradient in aside.items():
                    weight.grad = gradient
            self._messenger.drain(max(0, self._step - 1))

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scales all ranks' gradients so that their norm is at most ``max_norm``, as one process would, to the bit.

        For use between :meth:`local_step` and the optimizer's step; all ranks wait for each other there. Called by all.

        Returns:
            the norm before.

        Raises:
            PipelineError: if another rank is lost, or does not come.
        """
        places = {weight: at for at, weight in enumerate(self.model.parameters())}
        weights = self._fitted.weights
        owned = [(places[weight], weight.grad) for weight in weights if weight.grad is not None]
        with self._alarmed():
            norm = together(
                lambda: total_norm(owned, len(places), norm_type, self._fitted.everybody, self._fitted.device),
                f"to clip_grad_norm_ after step {self._step - 1}",
                self._timeout,
            )
        torch.nn.utils.clip_grads_with_norm_(weights, max_norm, norm)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the state, by the names of the whole model: ``{"model": ..., "optimizer": ...}``.

        For ``torch.distributed.checkpoint``, which puts the parts together: ``save(pipe.state_dict(), checkpoint_id=folder)`` on
        all ranks. Any other layout, and one process, loads that. There the same is::

            options = StateDictOptions(flatten_optimizer_state_dict=True)
            {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}

        with the functions of ``torch.distributed.checkpoint.state_dict``.

        Raises:
            RuntimeError: in eager mode, if a gradient is still to come.
        """
        self._check_flushed()
        state = {"model": model_state(self.model, self._fitted.owned)}
        return state | {"optimizer": optimizer_state(self.model, self.optimizer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what :meth:`state_dict` gave, on any layout, after ``torch.distributed.checkpoint.load(state, ...)``.

        Raises:
            KeyError: if a weight of this rank is missing.
            RuntimeError: in eager mode, if a gradient is still to come.
        """
        self._check_flushed()
        load_model_state(self.model, state["model"], self._fitted.owned)
        load_optimizer_state(self.model, self.optimizer, state["optimizer"])

    @property
    def bytes_sent(self) -> int:
        """What this rank has sent to its neighbours so far."""
        return self._messenger.sent

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> None:
        """What DistributedDataParallel asks for first."""
        raise TypeError("data parallel and pipeline do not go together yet; train the Pipeline as it is")

    def _check_flushed(self) -> None:
        if self._late is not None:
            raise RuntimeError(
                "in eager mode the last gradient of the highest stage is still to be applied; call flush() first"
            )

    def _finish(self, late: Late, later: int = 0) -> None:
        gradients = self._messenger.receive_gradient(self._fitted.share.from_above[0], later=later)
        with autocast_off(self._fitted.device.type):
            late.finish(gradients, Accumulate())

    @contextmanager
    def _alarmed(self) -> Iterator[None]:
        """What fails here ends the neighbours too."""
        try:
            yield
        except BaseException as error:
            self._messenger.alarm(error)
            raise

    def _pass(self, inlet: Any) -> Tensor:
        messenger, fitted = self._messenger, self._fitted
        model = self.model

        def evaluate(k: int, outlet: Any) -> Tensor:
            loss = model.loss[k] if isinstance(model.loss, nn.ModuleList) else model.loss
            last, decoder, features = model.plan.units[k].last, model.decoders[k], model.features(outlet)
            rows = messenger.batch.rows
            if not features.ndim or features.shape[0] != rows:
                check_rows(last, model.stages[last], features, rows)
            read = outlet if isinstance(decoder, FromOutlet) else features
            with apart():  # the other ranks are at other stages
                return unit_loss(k, decoder, loss, messenger.batch.views, messenger.batch.targets, read)

        if trained := [name for name, tensor in fitted.shared.items() if tensor.requires_grad]:
            raise ValueError(
                f"stages of several ranks use {trained[:3]}, frozen when the pipeline was built, and now it is trained: the "
                "ranks' copies would drift apart. Put those stages on one rank, or keep it frozen"
            )
        versions = [version(tensor) for tensor in fitted.shared.values()]
        torch.clear_autocast_cache()
        isolation = Isolation(model.backbone, model.stages)
        delayed = self._mode == "eager" and bool(fitted.share.from_above)
        copies = copied(fitted.highest) if delayed else {}
        keep = swapped(model.backbone, copies) if delayed else None
        with draws(messenger.batch.seed, model) as draw:
            given = (
                fitted.share,
                model.plan.units,
                evaluate,
                Accumulate(),
                messenger,
                isolation,
                draw,
                fitted.device.type,
            )
            one = RankPass(*given, eager=self._mode == "eager", keep=keep)
            try:
                fitted.part.run(messenger.batch.inputs, lambda: one.begin(inlet), one.on_outlet)
            finally:
                one.close()
            if delayed:
                before, self._late = self._late, Late(*one.held(), copies)
                if before is not None:
                    self._finish(before, later=1)
            else:
                one.finish()
        if written := [n for (n, t), v in zip(fitted.shared.items(), versions, strict=True) if version(t) != v]:
            raise ValueError(
                f"stages of several ranks read {written[:3]}, and a forward has changed it: the ranks' copies would drift apart. "
                "Give each stage one of its own"
            )
        return torch.stack(one.losses) if one.losses else torch.empty(0, device=fitted.device)
