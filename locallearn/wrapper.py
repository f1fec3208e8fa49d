"""LocalWrapper: a backbone, cut into stages, with a plan, decoders and a local loss."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from locallearn._fitting.attach import Decoder, FromOutlet, attach, under_autocast
from locallearn._fitting.batches import View, ViewsChangedError, concatenated, example_batch, rows, spared
from locallearn._fitting.features import Features, Which
from locallearn._fitting.objective import Loss, check_scale, registered, unit_loss, warn_of_fp16
from locallearn._fitting.outlets import check_graph, check_rows, probe
from locallearn._fitting.parallel import check_parallel
from locallearn._fitting.recomputed import Policy, runs
from locallearn._walk.cuts import find, submodules
from locallearn._walk.gradients import Accumulate, Accumulator, Collect, Reduce
from locallearn._walk.local_pass import LocalPass
from locallearn._walk.segment import leaves
from locallearn._walk.trees import mapped, tensors
from locallearn._walk.uncompiled import uncompiled
from locallearn.distributed import StageReducer, covers_the_world, world_size
from locallearn.losses import InfoNCE
from locallearn.plan import Plan
from locallearn.schedules import Schedule, sequential
from locallearn.schedules.actions import Execution
from locallearn.sharing import Hard, Sharing

Scale: TypeAlias = float | Tensor | None

_SUCH_AS = {"sharing": "UpperOnly()", "plan": "Plan.windows(4, overlap=1)"}


class LocalWrapper(nn.Module):
    """Trains ``model`` locally: units of neighbouring stages, each by its own loss through a small decoder.

    A :term:`stage` ends *after* each submodule named in ``stages``. What comes before the first cut belongs to stage 0; what
    comes after the last one (pooling, a classifier) runs, but is not trained. Over a cut passes what the submodule returns, a
    tensor or several in a tuple, list, dict or dataclass, and nothing else: a skip connection, a reused module or a shared
    parameter across it is refused. A :term:`unit` is a run of stages with one loss, whose :term:`decoder` reads the
    :term:`outlet` of the last of them.

    ``overlap=0`` is Greedy InfoMax, ``overlap=1`` LoCo, ``overlap=len(stages) - 1`` end-to-end training (SimCLR).

    Args:
        model: any backbone; it is trained in place, and carries hooks only while a local pass runs.
        stages: the submodules after which a stage ends, in the order in which they run: names (dotted ones too), the
            modules themselves, or, for an ``nn.Sequential``, child indices. ``"auto"`` picks four (as many as ``plan`` has)
            by :func:`locallearn.plan_stages`, for the lowest peak of 64 inputs as large as ``example``.
        overlap: how many stages neighbouring units share.
        decoder: ``decoder(width)`` makes a unit's decoder for an outlet of that many channels; or a list of modules, one
            per unit. ``"auto"`` picks by the outlet's shape, see :func:`locallearn.decoders.fitting.fitting`. See
            :mod:`locallearn.decoders`.
        loss: called as ``loss(*outputs)`` with the decoder's output for each view, or ``loss(*outputs, targets)``;
            returns a scalar. One for all units or a list with one per unit; default ``InfoNCE()``. Modules are registered.
        sharing: ``Hard()`` (default), ``UpperOnly()`` or ``Soft(coefficient)``: the rows of Table 5.
        plan: replaces ``overlap`` and ``sharing``.
        schedule: in what order the plan is carried out: ``sequential`` (least memory) or ``fused``.
        checkpoint: what runs again in the backward instead of being kept: ``True`` for every block of the backbone and every
            run of simple layers between blocks, such as the stem; a class of modules such as ``Bottleneck``, or a callable
            ``module -> bool``; or a tuple of those, one inside of another too. Gradients, torch's random numbers and
            BatchNorm's statistics stay as they are without it; a part that depends on other state is refused in the first step,
            which compares what it computes the second time.
        example: a batch that the backbone takes, to find the outlets' widths with: a view, or a list of views; two 224-pixel
            RGB images by default.
        channel_axis: the axis of the outlets that holds the channels: 1 or -1. By default the modules tell that make
            or read them (convolutions, norms, linear layers), else their shape, see
            :func:`locallearn._fitting.channels.channel_axis`. Four-dimensional outlets with channels last reach the decoder with
            channels first.
        features: which tensor decoders read where stages return several: an index, a key or attribute, or a callable of
            what a stage returns, which may put several together; by default the first of real numbers.

    Attributes:
        backbone: ``model`` itself.
        stages: the names of the submodules after which the stages end.
        decoders: one per unit, in the units' order.
        plan: what each unit reaches and updates; ``print(model.plan)`` draws it.
        losses: the units' losses in the last pass, shape ``(units,)``, detached; ``None`` before the first.
        penalty: the sharing's penalty in the last pass (``Soft``), detached, or ``None``.

    Raises:
        TypeError: for arguments of the wrong kind, or an outlet without a tensor for the decoder.
        ValueError: for stages that do not exist, run or follow each other, and for a plan, decoders or losses that do not
            fit them.

    Example:
        >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
        >>> model = LocalWrapper(backbone, stages=[0, 2, 4], overlap=1)
        >>> losses = model.local_step(torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32))
        >>> losses.shape, backbone[0].weight.grad.shape
        (torch.Size([2]), torch.Size([8, 3, 3, 3]))
    """

    losses: Tensor | None
    penalty: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[str] | Sequence[int] | Sequence[nn.Module] | Literal["auto"],
        overlap: int = 1,
        decoder: Decoder = "auto",
        *,
        loss: Loss | Sequence[Loss] | None = None,
        sharing: Sharing | None = None,
        plan: Plan | None = None,
        schedule: Schedule = sequential,
        checkpoint: Policy = False,
        example: View | Sequence[View] | None = None,
        channel_axis: int | None = None,
        features: Which = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"LocalWrapper wraps an nn.Module; got {model!r}")
        for name, given, kind in (("sharing", sharing, Sharing), ("plan", plan, Plan)):
            if given is not None and not isinstance(given, kind):
                raise TypeError(f"{name} is an object of {kind.__name__}, such as {_SUCH_AS[name]}; got {given!r}")
        if plan is not None and sharing is not None:
            raise ValueError("plan= replaces overlap and sharing; give a plan or a sharing")
        if channel_axis not in (None, 1, -1):
            raise ValueError(f"channel_axis is 1, -1 or None; got {channel_axis}")
        submodules(model, ())  # refuses a compiled one
        check_graph(model)
        check_parallel(model, model)
        if stages == "auto":
            from locallearn.memory.planning import automatic  # noqa: PLC0415 - slow to import, see locallearn/__init__.py

            wanted = plan or (sharing or Hard()).plan(4, overlap)
            stages = automatic(model, wanted, decoder, checkpoint, example, channel_axis)
        self.stages = find(model, stages)
        self.sharing = Hard() if sharing is None else sharing
        plan = self.sharing.plan(len(self.stages), overlap) if plan is None else plan
        if plan.stages != len(self.stages):
            raise ValueError(f"the plan is for {plan.stages} stages, but stages= names {len(self.stages)}")
        self._execution = Execution(plan, schedule)
        self.backbone = model
        batch = example_batch(model, example)
        self.features = Features(features)
        copied = mapped(lambda tensor: tensor.detach().clone(), batch)
        outlets = probe(model, self.stages, copied, self.features)
        self._changes_views = any(tensor._version > 0 for tensor in tensors(copied))
        self._runs = runs(model, self.stages, checkpoint, batch)
        if checkpoint is True and not self._runs and any(outlet.whole is not None for outlet in outlets):
            raise ValueError(
                f"checkpoint=True chooses no submodule of {type(model).__name__}: it takes blocks between which one tensor "
                "passes. Where blocks return several, name their class: checkpoint=Block"
            )
        dtype = under_autocast(model, tensors(batch)[0].device.type)
        self.decoders = attach(decoder, plan, self.sharing, outlets, channel_axis, dtype, self.features)
        self.loss = registered(InfoNCE() if loss is None else loss, len(plan.units))
        self._whole = [outlet.module is not None for outlet in outlets]
        self._reducer = StageReducer()
        self.losses = None
        self.penalty = None

    @property
    def plan(self) -> Plan:
        """What each unit reaches and updates."""
        return self._execution.plan

    @property
    def schedule(self) -> Schedule:
        """In what order the plan is carried out."""
        return self._execution.schedule

    def local_step(
        self,
        *views: View,
        targets: Any = None,
        grad_scale: float | Tensor | None = None,
        group: dist.ProcessGroup | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """One forward, in which every unit is trained as soon as the schedule says; gradients are added to ``.grad``.

        Replaces ``loss = model(*views); loss.backward()``, without ever holding the whole network's graph. Under
        DistributedDataParallel use :meth:`forward`; with several plain processes give a ``group``.

        Args:
            views: one or more batches of the same shape; the backbone sees them as one batch, the loss one by one.
                No gradient goes to them. A view is a tensor; or a tuple or a mapping of tensors and constants, which the
                backbone gets as ``backbone(*view)`` or ``backbone(**view)``.
            targets: handed to the loss as its last argument, if not ``None``; of any kind and shape.
            grad_scale: for fp16, ``scaler.scale(torch.ones(()))``, on the scaler's device: the gradients come out multiplied
                by it, for the scaler's ``unscale_`` or ``step``. (``get_scale()`` says the same, but a GradScaler refuses
                to step before it has scaled something.)
            group: processes that train the same weights on other data, such as ``torch.distributed.group.WORLD``. In the end
                ``.grad`` has the mean over them; a stage's gradients travel while others are still computed.
            seed: of what dropout draws in this step, by stage and unit, as in a :class:`locallearn.pipeline.Pipeline`.

        Returns:
            the units' losses, shape ``(units,)``, detached and unscaled: this process's own.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("local_step trains, and gradients are disabled here; to evaluate, call model(*views)")
        check_parallel(self, self.backbone, step=True)
        if group is None and world_size() > 1 and not covers_the_world(self.parameters()):
            warnings.warn(
                "local_step leaves this process's own gradients in .grad; nothing averages them over the "
                f"{world_size()} processes. Give it those that share a model, model.local_step(*views, "
                "group=torch.distributed.group.WORLD); or call loss = model(*views); loss.backward() on the "
                "DistributedDataParallel module; or locallearn.distributed.average_gradients(model.parameters()) afterwards",
                stacklevel=2,
            )
        if grad_scale is None:
            warn_of_fp16(views)
        return self._step(views, targets, grad_scale, group, seed)

    @uncompiled
    def _step(
        self, views: tuple[View, ...], targets: Any, scale: Scale, group: dist.ProcessGroup | None, seed: int | None
    ) -> Tensor:
        if group is None:
            return self._pass(views, targets, Accumulate(), scale, seed)
        reduction = self._reducer.step(self.parameters(), group)
        losses = self._pass(views, targets, Reduce(reduction), scale, seed)
        reduction.finish()
        return losses

    def forward(self, *views: View, targets: Any = None, grad_scale: float | Tensor | None = None) -> Tensor:
        """The sum of the units' losses; its backward adds the same gradients as :meth:`local_step`.

        They are computed here, unit by unit, and handed to the weights in backward, so that DistributedDataParallel,
        gradient clipping and every ordinary loop work. Under ``torch.no_grad`` the units are only evaluated.

        Args:
            views: as for :meth:`local_step`.
            targets: as for :meth:`local_step`.
            grad_scale: for fp16, ``scaler.get_scale()``, to be used with ``scaler.scale(loss).backward()``: the backward
                inside works on scaled losses, and the one outside multiplies by the incoming gradient over ``grad_scale``.

        Returns:
            a scalar. ``model.losses`` has its terms.
        """
        if grad_scale is None and torch.is_grad_enabled():
            warn_of_fp16(views)
        return self._call(views, targets, grad_scale)

    @uncompiled
    def _call(self, views: tuple[View, ...], targets: Any, grad_scale: Scale) -> Tensor:
        check_parallel(self, self.backbone)
        if not torch.is_grad_enabled():
            return self._pass(views, targets, None, None).sum()
        collected = Collect()
        total = self._pass(views, targets, collected, grad_scale).sum()
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        return collected.deliver(total, 1.0 if grad_scale is None else grad_scale, weights)

    def unwrap(self) -> nn.Module:
        """The backbone: the user's own object, which carries nothing of the wrapper."""
        return self.backbone

    def _pass(
        self,
        views: tuple[View, ...],
        targets: Any,
        accumulator: Accumulator | None,
        scale: Scale,
        seed: int | None = None,
    ) -> Tensor:
        batch = concatenated(views, copy=self._changes_views)
        ends = submodules(self.backbone, self.stages)
        length, decoders, features_of = rows(batch), [*self.decoders], self.features
        each = [*self.loss] if isinstance(self.loss, nn.ModuleList) else [self.loss] * len(decoders)

        def evaluate(k: int, outlet: Any) -> Tensor:
            decoder, features = decoders[k], features_of(outlet)
            if not features.ndim or features.shape[0] != length:
                last = self.plan.units[k].last
                check_rows(last, self.stages[last], features, length)
            read = outlet if isinstance(decoder, FromOutlet) else features
            return unit_loss(k, decoder, each[k], len(views), targets, read)

        check_scale(scale)
        torch.clear_autocast_cache()  # a weight cast under no_grad before would be found there, without its graph
        local = LocalPass(
            self.backbone, self.stages, ends, self._execution, evaluate, accumulator, scale, self._runs, seed
        )
        try:
            with spared(batch, views):
                losses = torch.stack(local.run(batch))
        except ViewsChangedError:
            self._changes_views = True
            raise
        self.losses = losses
        self._train_penalty(ends, accumulator, scale)
        return losses

    def _train_penalty(self, ends: Sequence[nn.Module], accumulator: Accumulator | None, grad_scale: Scale) -> None:
        stages = [end if whole else None for end, whole in zip(ends, self._whole, strict=True)]
        with torch.set_grad_enabled(accumulator is not None):
            penalty = self.sharing.penalty(self.decoders, stages)
            self.penalty = None if penalty is None else penalty.detach()
            if accumulator is not None and penalty is not None and penalty.requires_grad:
                accumulator.push([penalty if grad_scale is None else penalty * grad_scale], leaves(penalty), ())
