"""One plain forward, and one whole backward per unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from locallearn._fitting.attach import FromOutlet
from locallearn._fitting.batches import View, concatenated, plain_views
from locallearn._walk.trees import called, mapped, tensors
from locallearn.schedules import Forward
from locallearn.testing.copies import copied, double, doubled, gradients, replayed, under_autocast
from locallearn.wrapper import LocalWrapper


class LocalGradients(NamedTuple):
    """What a local pass must give.

    Attributes:
        losses: of the units, shape ``(units,)``.
        penalty: the sharing's, or ``None``.
        gradients: by the parameters' names; those that no unit trains are left out.
        buffers: as they are after the forward, by name. Those that a backward changes again are left out: a
            ``torch.utils.checkpoint`` of your own updates BatchNorm's statistics as often as something is run again.
        stages: the stage that each weight of the backbone belongs to, by name.
        trained_by: the units whose losses train each parameter, by name.
        dtype: the coarsest one in which anything between the weights and the losses was computed.
    """

    losses: Tensor
    penalty: Tensor | None
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    stages: dict[str, int]
    trained_by: dict[str, tuple[int, ...]]
    dtype: torch.dtype


def local_gradients(model: LocalWrapper, *views: View, targets: Any = None) -> LocalGradients:
    """The gradients of the :term:`units <unit>`' losses by plain autograd: one forward, and one whole backward per unit.

    Everything happens on deep copies in double precision, complex numbers in ``complex128``. A model that fails there
    (a part of it casts to single precision), and any inside of autocast, keeps the precision that it has.

    ``model`` stays as it was, and so do the random numbers of torch (on all devices), Python and numpy: what follows
    draws those that were drawn here. Hooks of modules are copied along; hooks of weights (``weight.register_hook``) are
    not, since torch does not copy them. What a copy does not reach is shared with it, such as a list to which a hook appends.

    Args:
        model: a wrapped backbone, in the mode and with the weights frozen in which it is to be looked at.
        views: as for :meth:`locallearn.LocalWrapper.local_step`; a few images are enough.
        targets: handed to the loss as its last argument, if not ``None``.

    Raises:
        TypeError: if ``model`` is not a ``LocalWrapper``, or a view neither a tensor nor a tuple or mapping of some.
        ValueError: without views; if something is trained that no module registers as a parameter; if a stage does not
            end once.
        RuntimeError: if the model cannot be copied.

    Example:
        >>> from torch import nn
        >>> from locallearn import LocalWrapper, MLPDecoder
        >>> from locallearn.testing import local_gradients
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 8))
        >>> model = LocalWrapper(net, [1, 2, 3], decoder=MLPDecoder, example=torch.rand(2, 4))
        >>> expected = local_gradients(model, torch.rand(5, 4), torch.rand(5, 4))
        >>> expected.trained_by["backbone.2.weight"], expected.gradients["backbone.2.weight"].dtype
        ((0, 1), torch.float64)
    """
    return prepared(model, views, targets).expected


class Prepared(NamedTuple):
    """A copy in double precision where that works, what it gets, and what a pass must give on it."""

    model: LocalWrapper
    views: tuple[View, ...]
    targets: Any
    expected: LocalGradients
    why: str


@replayed()
def prepared(model: LocalWrapper, views: tuple[View, ...], targets: Any) -> Prepared:
    """Copies ``model``, and runs the reference on another copy."""
    if not isinstance(model, LocalWrapper):
        inner = " Take what it wraps, `.module`." if isinstance(getattr(model, "module", None), LocalWrapper) else ""
        raise TypeError(f"a LocalWrapper is compared with plain autograd; got {type(model).__name__}.{inner}")
    views = tuple(plain_views(views))
    plain, why = copied(model), ""
    if not under_autocast(tensors(views[0])[0]):
        try:
            exact = double(copied(model)), tuple(mapped(doubled, view) for view in views), tree_map(doubled, targets)
            return Prepared(*exact, _reference(copied(exact[0]), *exact[1:]), "")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised below if double precision is not its cause
            why = f", since in double precision it fails: {str(error).strip() or type(error).__name__}"
    return Prepared(plain, views, targets, _reference(copied(model), views, targets), why)


def _reference(model: LocalWrapper, views: Sequence[View], targets: Any) -> LocalGradients:
    """Runs on ``model`` itself, which is a copy."""
    with replayed():
        outlets, losses = forward(model, views, targets)
        penalty = penalty_of(model)
        names = {id(weight): name for name, weight in model.named_parameters()}
        stages = weights_of_stages(outlets)

        dtypes, trained_by = set[torch.dtype](), dict[str, tuple[int, ...]]()
        roots = [] if penalty is None else [(penalty, graph(penalty)[0])]
        for k, (unit, loss) in enumerate(zip(model.plan.units, losses, strict=True)):
            reached, computed = graph(loss)
            dtypes |= computed
            _check_registered(k, [weight for weight in reached if id(weight) not in names])
            weights = {id(w): w for stage in unit.updates for w in stages[stage]}
            heads = [part for part in (model.decoders[k], _loss(model, k)) if isinstance(part, nn.Module)]
            weights |= {id(w): w for part in heads for w in part.parameters() if w.requires_grad}
            roots.append((loss, list(weights.values())))
            for weight in weights:
                trained_by[names[weight]] = (*trained_by.get(names[weight], ()), k)

        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        with torch.autocast(losses[0].device.type, enabled=False):
            for root, inputs in roots:
                if inputs and root.requires_grad:
                    torch.autograd.backward(root, inputs=inputs, retain_graph=True)
    return LocalGradients(
        torch.stack([loss.detach() for loss in losses]),
        None if penalty is None else penalty.detach(),
        gradients(model),
        {name: buffers[name] for name, buffer in model.named_buffers() if _same(buffer, buffers[name])},
        {names[id(w)]: stage for stage, weights in enumerate(stages) for w in weights if id(w) in names},
        trained_by,
        max(dtypes, key=lambda dtype: torch.finfo(dtype).eps),
    )


def forward(model: LocalWrapper, views: Sequence[View], targets: Any) -> tuple[list[Any], list[Tensor]]:
    """The stages' outlets and the units' losses, of one plain forward in which nothing is cut.

    Losses are evaluated when the schedule trains their units: decoders may draw random numbers, in between those of stages.
    """
    due: dict[int, list[int]] = {stage: [] for stage in range(model.plan.stages)}
    latest = 0
    for action in model.schedule(model.plan):
        if isinstance(action, Forward):
            latest = action.stage
        else:
            due[latest].append(action.unit)
    ran: list[int] = []
    outlets: list[Any] = []
    losses: dict[int, Tensor] = {}

    def noted(stage: int, end: nn.Module) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            output = end._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
            ran.append(stage)
            with torch.inference_mode(False), torch.enable_grad():  # whatever the backbone has set around this place
                outlets.append(_cloned(output))  # since the next stage may begin with an operation in place
                if ran == list(range(stage + 1)):
                    losses.update({k: _evaluated(model, k, outlets, len(views), targets) for k in due[stage]})
            return output

        return call

    ends: list[Any] = [model.backbone.get_submodule(name) for name in model.stages]
    for stage, end in enumerate(ends):  # around the whole call: behind the hooks on its backward, too
        end._compiled_call_impl = noted(stage, end)
    called(model.backbone, concatenated(views, copy=True))
    for end in ends:
        del end._compiled_call_impl
    if ran != list(range(len(ends))):
        raise ValueError(
            f"each stage ends once, in the order of stages={list(model.stages)}; in this forward they ended in the order "
            f"{[model.stages[stage] for stage in ran]}"
        )
    return outlets, [losses[k] for k in range(len(losses))]


def _cloned(outlet: Any) -> Any:
    """A copy with its graph, in which a tensor that is there twice stays one."""
    known: dict[Tensor, Tensor] = {}
    return mapped(lambda tensor: known.setdefault(tensor, tensor.clone()), outlet)


def _evaluated(model: LocalWrapper, k: int, outlets: Sequence[Any], views: int, targets: Any) -> Tensor:
    outlet, decoder = outlets[model.plan.units[k].last], model.decoders[k]
    output = decoder(outlet if isinstance(decoder, FromOutlet) else model.features(outlet))
    outputs = [output] if views == 1 else output.chunk(views)
    loss: Tensor = _loss(model, k)(*outputs, *([] if targets is None else [targets]))
    return loss.reshape(())


def _loss(model: LocalWrapper, k: int) -> Any:
    return model.loss[k] if isinstance(model.loss, nn.ModuleList) else model.loss


def graph(root: Tensor) -> tuple[list[Tensor], set[torch.dtype]]:
    """Every leaf that the graph of ``root`` reaches, and the floating dtypes of all that was computed on the way."""
    found = {id(root): root} if root.grad_fn is None and root.requires_grad else {}
    dtypes = {root.dtype}
    seen: set[object] = set()
    stack: list[tuple[Any, int]] = [(root.grad_fn, root.output_nr)]
    while stack:
        node, result = stack.pop()
        if node is None:
            continue
        if results := getattr(node, "_input_metadata", ()):  # of those that no gradient reaches it tells nothing
            dtypes.add(results[result].dtype)
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        stack += node.next_functions
    return list(found.values()), {dtype.to_real() for dtype in dtypes if dtype.is_floating_point or dtype.is_complex}


def weights_of_stages(outlets: Sequence[Any]) -> list[list[Tensor]]:
    """For each stage, the weights that its outlet reaches and the one below does not."""
    stages: list[list[Tensor]] = []
    below: set[int] = set()
    for outlet in outlets:
        reached = {id(weight): weight for tensor in tensors(outlet) for weight in graph(tensor)[0]}
        stages.append([weight for weight in reached.values() if id(weight) not in below])
        below |= reached.keys()
    return stages


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.isclose(one, other, rtol=0, atol=0, equal_nan=True).all())


def penalty_of(model: LocalWrapper) -> Tensor | None:
    """What the sharing adds to the losses."""
    ends = [model.backbone.get_submodule(name) for name in model.stages]
    return model.sharing.penalty(
        model.decoders, [end if whole else None for end, whole in zip(ends, model._whole, strict=True)]
    )


def _check_registered(k: int, others: Sequence[Tensor]) -> None:
    if others:
        raise ValueError(
            f"the loss of unit {k} reaches {len(others)} trainable tensor(s) that are no parameters of the model, of shapes "
            f"{[tuple(other.shape) for other in others]}: they have no names, and may be shared with copies of it. Register "
            "them: a decoder or a loss that holds weights is an nn.Module with nn.Parameters, not a function around them"
        )
