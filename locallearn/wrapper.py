"""LocalWrapper: a backbone, cut into stages, with a plan, decoders and a local loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from locallearn._attach import attach
from locallearn._cuts import find, refuse_compiled
from locallearn._engine import LocalPass
from locallearn._gradients import Accumulate, Collect, Sink
from locallearn._segment import leaves
from locallearn._shapes import example_batch, probe
from locallearn.decoders import ConvMLPDecoder
from locallearn.distributed import world_size
from locallearn.losses import InfoNCE
from locallearn.plan import Plan
from locallearn.schedules import Schedule, sequential
from locallearn.schedules.actions import check
from locallearn.sharing import Hard, Sharing

Decoder: TypeAlias = Callable[[int], nn.Module] | Sequence[nn.Module]
Loss: TypeAlias = Callable[..., Tensor]


class LocalWrapper(nn.Module):
    """Trains ``model`` locally: units of neighbouring stages, each by its own loss through a small decoder.

    A stage ends *after* each submodule named in ``stages``. What comes before the first cut belongs to stage 0; what comes
    after the last one (pooling, a classifier) runs, but is not trained. Over a cut passes one tensor and nothing else: a
    skip connection, a reused module or a shared parameter across it is refused.

    ``overlap=0`` is Greedy InfoMax, ``overlap=1`` LoCo, ``overlap=len(stages) - 1`` end-to-end training (SimCLR).

    Args:
        model: any backbone; it is trained in place, and carries hooks only while a local pass runs.
        stages: the submodules after which a stage ends, in the order in which they run: names (dotted ones too), the
            modules themselves, or, for an ``nn.Sequential``, child indices.
        overlap: how many stages neighbouring units share.
        decoder: ``decoder(width)`` makes a unit's decoder for an outlet of that many channels; or a list of modules, one
            per unit. See :mod:`locallearn.decoders`.
        loss: called as ``loss(*outputs)`` with the decoder's output for each view, or ``loss(*outputs, targets)``;
            returns a scalar. One for all units or a list with one per unit; default ``InfoNCE()``. Modules are registered.
        sharing: ``Hard()`` (default), ``UpperOnly()`` or ``Soft(coefficient)``: the rows of Table 5.
        plan: replaces ``overlap`` and ``sharing``.
        schedule: in what order the plan is carried out: ``sequential`` (least memory) or ``fused``.
        example: a batch that the backbone takes, to find the outlets' widths with; two 224-pixel RGB images by default.
        channel_axis: the axis of the outlets that holds the channels: 1 or -1. By default their shape tells, see
            :func:`locallearn._shapes.channel_axis`. Four-dimensional outlets with channels last reach the decoder with
            channels first.

    Attributes:
        backbone: ``model`` itself.
        decoders: one per unit, in the units' order.
        plan: what each unit reaches and updates; ``print(model.plan)`` draws it.
        losses: the units' losses in the last pass, shape ``(units,)``, detached; ``None`` before the first.
        penalty: the sharing's penalty in the last pass (``Soft``), detached, or ``None``.

    Raises:
        TypeError: for arguments of the wrong kind, or an outlet that is not one tensor.
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
        stages: Sequence[str] | Sequence[int] | Sequence[nn.Module],
        overlap: int = 1,
        decoder: Decoder = ConvMLPDecoder,
        *,
        loss: Loss | Sequence[Loss] | None = None,
        sharing: Sharing | None = None,
        plan: Plan | None = None,
        schedule: Schedule = sequential,
        example: Tensor | Sequence[Tensor] | None = None,
        channel_axis: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"LocalWrapper wraps an nn.Module; got {model!r}")
        if plan is not None and sharing is not None:
            raise ValueError("plan= replaces overlap and sharing; give a plan or a sharing")
        if channel_axis not in (None, 1, -1):
            raise ValueError(f"channel_axis is 1, -1 or None; got {channel_axis}")
        refuse_compiled(model)
        self._cuts = find(model, stages)
        self.sharing = Hard() if sharing is None else sharing
        self.plan = self.sharing.plan(len(self._cuts), overlap) if plan is None else plan
        if self.plan.stages != len(self._cuts):
            raise ValueError(f"the plan is for {self.plan.stages} stages, but stages= names {len(self._cuts)}")
        self.schedule = schedule
        check(self.plan, schedule(self.plan))
        self.backbone = model
        batch = example_batch(model, example)
        refuse_compiled(model, self._cuts)
        outlets = probe(model, self._cuts, batch)
        dtype = next((t.dtype for t in model.parameters() if t.is_floating_point()), torch.get_default_dtype())
        self.decoders = attach(decoder, self.plan, self.sharing, outlets, channel_axis, dtype)
        self.loss = _registered(InfoNCE() if loss is None else loss, len(self.plan.units))
        self._whole = [outlet.module is not None for outlet in outlets]
        self.losses = None
        self.penalty = None

    def local_step(self, *views: Tensor, targets: Any = None, grad_scale: float | Tensor | None = None) -> Tensor:
        """One forward, in which every unit is trained as soon as the schedule says; gradients are added to ``.grad``.

        Replaces ``loss = model(*views); loss.backward()``, without ever holding the whole network's graph. Under
        DistributedDataParallel use :meth:`forward`, or call :func:`locallearn.distributed.average_gradients` afterwards.

        Args:
            views: one or more batches of the same shape; the backbone sees them as one batch, the loss one by one.
                No gradient goes to them.
            targets: handed to the loss as its last argument, if not ``None``.
            grad_scale: for fp16, ``scaler.get_scale()``: the gradients come out multiplied by it, for the scaler's
                ``unscale_`` or ``step``.

        Returns:
            the units' losses, shape ``(units,)``, detached and unscaled.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("local_step trains, and gradients are disabled here; to evaluate, call model(*views)")
        if world_size() > 1:
            warnings.warn(
                "local_step leaves this process's own gradients in .grad; nothing averages them over the "
                f"{world_size()} processes. Call loss = model(*views); loss.backward() on the DistributedDataParallel "
                "module, or locallearn.distributed.average_gradients(model.parameters()) after local_step",
                stacklevel=2,
            )
        return self._pass(views, targets, Accumulate(), grad_scale)

    def forward(self, *views: Tensor, targets: Any = None, grad_scale: float | Tensor | None = None) -> Tensor:
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
        self, views: tuple[Tensor, ...], targets: Any, sink: Sink | None, grad_scale: float | Tensor | None
    ) -> Tensor:
        batch = concatenated(views)
        refuse_compiled(self.backbone, self._cuts)
        if sink is not None and grad_scale is None:
            _warn_of_fp16(batch.device.type)

        def evaluate(k: int, features: Tensor) -> Tensor:
            output = self.decoders[k](features)
            arguments = [*_split(k, output, len(views)), *([] if targets is None else [targets])]
            loss = _scalar(k, self._loss_of(k)(*arguments))
            if isinstance(output, Tensor) and output.requires_grad and not loss.requires_grad:
                raise ValueError(
                    f"the loss of unit {k} has lost the graph of what it was given; does it detach, or use no_grad?"
                )
            return loss

        actions = self.schedule(self.plan)
        torch.clear_autocast_cache()  # a weight cast under no_grad before would be found there, without its graph
        local = LocalPass(self.backbone, self._cuts, self.plan, actions, evaluate, sink, grad_scale)
        losses = torch.stack(local.run(batch))
        self.losses = losses
        self._train_penalty(sink, grad_scale)
        return losses

    def _loss_of(self, k: int) -> Loss:
        loss: Loss = self.loss[k] if isinstance(self.loss, nn.ModuleList) else self.loss
        return loss

    def _train_penalty(self, sink: Sink | None, grad_scale: float | Tensor | None) -> None:
        modules = [self.backbone.get_submodule(cut) for cut in self._cuts]
        stages = [module if whole else None for module, whole in zip(modules, self._whole, strict=True)]
        with torch.set_grad_enabled(sink is not None):
            penalty = self.sharing.penalty(self.decoders, stages)
            self.penalty = None if penalty is None else penalty.detach()
            if sink is not None and penalty is not None and penalty.requires_grad:
                sink.push(penalty if grad_scale is None else penalty * grad_scale, leaves(penalty), None)


class _Function(nn.Module):
    """A plain function in a list of losses."""

    def __init__(self, function: Loss) -> None:
        super().__init__()
        self.function = function

    def forward(self, *outputs: Any) -> Tensor:
        return self.function(*outputs)


def _registered(loss: Loss | Sequence[Loss], units: int) -> nn.Module | Loss:
    """One loss for all units as it is, or a list of one per unit as a module list."""
    if isinstance(loss, nn.ModuleList | list | tuple):
        if len(loss) != units:
            raise ValueError(f"loss lists {len(loss)} losses for {units} units; it needs one for all, or one per unit")
        return nn.ModuleList(one if isinstance(one, nn.Module) else _Function(one) for one in loss)
    if not callable(loss):
        raise TypeError(
            f"loss is a callable on the decoders' outputs, such as InfoNCE(), or a list of them; got {loss!r}"
        )
    if isinstance(loss, type):
        raise TypeError(f"loss is an object, such as {loss.__name__}(); got the class {loss.__name__} itself")
    return loss


def concatenated(views: Sequence[Tensor]) -> Tensor:
    """The views as one batch, without a graph, so that BatchNorm sees all of them.

    Raises:
        TypeError: if one is not a tensor.
        ValueError: if there are none, or if their shapes differ.
    """
    if not views:
        raise ValueError("a local pass needs at least one view; got none")
    if wrong := [type(view).__name__ for view in views if not isinstance(view, Tensor)]:
        raise TypeError(f"views are tensors, one argument per view: model.local_step(view1, view2); got {wrong}")
    if len({(view.shape, view.dtype, view.device) for view in views}) > 1:
        kinds = "; ".join(f"{tuple(view.shape)} {view.dtype} on {view.device}" for view in views)
        raise ValueError(
            f"the views pass the backbone as one batch, so they need the same shape, dtype and device; got {kinds}"
        )
    first, storage = views[0].detach(), views[0].untyped_storage()
    if all(
        view.is_contiguous()
        and view.untyped_storage() is storage
        and view.storage_offset() == first.storage_offset() + k * first.numel()
        for k, view in enumerate(views)
    ):  # neighbours in memory, as from images.chunk(2), need no copy
        flat = first.as_strided((len(views) * first.numel(),), (1,))
        return flat.view(len(views) * len(first), *first.shape[1:])
    return torch.cat([view.detach() for view in views])


def _split(k: int, output: Any, views: int) -> Sequence[Any]:
    """The decoder's output for each view."""
    if views == 1:
        return [output]
    if not isinstance(output, Tensor) or output.ndim == 0 or len(output) % views:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ValueError(
            f"the decoder of unit {k} returns one tensor, the {views} views along its first axis; got {got}"
        )
    return output.chunk(views)


def _scalar(k: int, loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss of unit {k} returns a scalar tensor; got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(
            f"the loss of unit {k} returns a scalar; got shape {tuple(loss.shape)}. Reduce it, for example with reduction='mean'"
        )
    return loss.reshape(())


def _warn_of_fp16(device: str) -> None:
    available = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if available and torch.get_autocast_dtype(device) == torch.float16:
        warnings.warn(
            "fp16 autocast without grad_scale=: the local backward runs on unscaled losses, and small gradients are lost. Pass "
            "grad_scale=scaler.get_scale()",
            stacklevel=4,
        )
