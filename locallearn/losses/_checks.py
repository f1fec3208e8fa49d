"""What InfoNCE refuses, and what it says then. Shapes, types and settings only: no check reads a tensor's values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from locallearn.distributed import in_use, is_apart, world_size

APART = "InfoNCE takes other ranks' rows, which are of other stages in a pipeline. Leave gather= and group= away"


def check_settings(
    temperature: float | Tensor,
    form: str,
    same_label: str,
    reduction: str,
    gather: bool | str,
    tile: int | None,
    precision: str,
) -> None:
    """Refuse settings that no input could make right."""
    if isinstance(temperature, Tensor):
        if not temperature.is_floating_point() or temperature.numel() != 1:
            raise ValueError(
                f"temperature as a tensor must be one floating-point number; got shape {tuple(temperature.shape)} "
                f"of {temperature.dtype}"
            )
    elif isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a number or a tensor of one element; got {type(temperature).__name__}")
    elif not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite; got {temperature}")
    for name, given, known in (
        ("form", form, ("nt-xent", "two-way", "one-way")),
        ("same_label", same_label, ("attract", "ignore")),
        ("reduction", reduction, ("none", "sum", "mean")),
        ("gather", gather, (True, False, "auto")),
        ("precision", precision, ("single", "input")),
    ):
        if given not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {given!r}")
    if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 0):
        raise ValueError(f"tile must be None (choose by device), 0 (whole matrix) or a number of rows; got {tile!r}")
    if tile == 0 and precision == "input":
        raise ValueError("tile=0 is the reference, in single precision or better; precision='input' needs tiles")


def check_views(views: Sequence[Tensor]) -> None:
    """Refuse anything but floating-point tensors of one shape (N, D) on one device."""
    if not views:
        raise TypeError("InfoNCE needs the embeddings of at least one view, (N, D) each; got none")
    for number, view in enumerate(views):
        _check_floating(f"view {number}", view)
    shapes = [tuple(view.shape) for view in views]
    if any(len(shape) != 2 or shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"views must all have one shape (N, D); got {_listed(shapes)} (a queue goes by name: negatives=)"
        )
    _check_devices("views", views)


def check_pairs(views: Sequence[Tensor], labels: Tensor | None, form: str, needed: int) -> None:
    """Refuse fewer than `needed` pairs, and views that the form does not know how to compare."""
    if len(views) == 1 and labels is None:
        raise ValueError("InfoNCE needs two views, or one view with labels=; got one view without labels")
    if form != "nt-xent" and len(views) != 2:
        raise ValueError(f"form={form!r} compares two views; got {len(views)}")
    count = views[0].shape[0]
    if count < needed:
        what = "two pairs, or negatives=: the other pairs are the negatives" if needed == 2 else "one pair"
        raise ValueError(f"InfoNCE needs at least {what}; got N = {count}")


def check_negatives(negatives: Tensor, views: Sequence[Tensor], labels: Tensor | None, form: str) -> None:
    """Refuse negatives that are neither a queue (M, D) nor one set per query (N, M, D), or do not go with the rest."""
    _check_floating("negatives", negatives)
    n, d = views[0].shape
    shape = tuple(negatives.shape)
    queue = len(shape) == 2 and shape[1] == d
    paired = len(shape) == 3 and (shape[0], shape[2]) == (n, d)
    if not (queue or paired) or shape[-2] == 0:
        raise ValueError(
            f"negatives must be a queue (M, {d}) or one set per query ({n}, M, {d}), with M > 0; got {shape}"
        )
    _check_devices("views and negatives", [*views, negatives])
    if len(views) != 2 or form == "two-way" or labels is not None:
        raise ValueError(
            "negatives= makes view 0 the query and view 1 its positive: it goes with two views, without labels and "
            f"without form='two-way'; got {len(views)} view(s), form={form!r}, labels "
            f"{'not given' if labels is None else 'given'}"
        )


def check_labels(labels: Tensor, views: Sequence[Tensor], same_label: str) -> None:
    """Refuse labels that are not one integer per row."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor; got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be integers; got {labels.dtype}")
    if labels.shape != views[0].shape[:1]:
        raise ValueError(f"labels must have shape ({views[0].shape[0]},), one per row; got {tuple(labels.shape)}")
    _check_devices("views and labels", [*views, labels])
    if len(views) == 1 and same_label == "ignore":
        raise ValueError("one view has only its labels to find positives by; same_label='ignore' needs two views")


def check_group(gather: bool | str, group: dist.ProcessGroup | None) -> None:
    """Refuse a group that this process is not in, or whose rows are not to be gathered."""
    if group is None:
        return
    world_size(group)
    if gather is False:
        raise ValueError("group= names the ranks whose rows are gathered, and gather=False gathers none: drop one")


def gathers(gather: bool | str, group: dist.ProcessGroup | None, negatives: Tensor | None) -> bool:
    """Whether this call uses the embeddings of other ranks; refuse what would wait for them in vain."""
    check_group(gather, group)
    if negatives is not None:
        if group is not None:
            raise ValueError("negatives= are taken as they are and nothing is gathered; they do not go with group=")
        return False
    if gather is True and not in_use():
        raise ValueError("gather=True needs torch.distributed.init_process_group() first; gather='auto' does not")
    if gather is False or world_size(group) == 1:
        return False
    if is_apart():
        if gather is True or group is not None:
            raise ValueError(APART)
        return False
    if _joins():
        raise RuntimeError(
            "InfoNCE gathers rows of every rank, and a rank that has run out of data does not answer under join(): the "
            "others would wait for ever. Give the ranks equally many batches (DistributedSampler does), or InfoNCE "
            "gather=False"
        )
    return True


def check_alone(everywhere: bool) -> None:
    """Refuse to gather where torch.func would have to see into a collective."""
    if everywhere:
        raise NotImplementedError(
            "torch.func and forward-mode derivatives do not reach other ranks' rows; compute the loss outside of them, "
            "or of this rank's rows alone, with gather=False"
        )


def _joins() -> bool:
    """Whether this is the forward of a DistributedDataParallel inside of its `join()`; elsewhere nothing tells."""
    running = getattr(DistributedDataParallel, "_active_ddp_module", None)
    return bool(getattr(getattr(running, "_join_config", None), "enable", False))


def _check_floating(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor of embeddings; got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name} must hold floating-point embeddings; got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )


def _check_devices(names: str, tensors: Iterable[Tensor]) -> None:
    devices = [tensor.device for tensor in tensors]
    if any(device != devices[0] for device in devices):
        raise ValueError(f"{names} must all be on one device; got {_listed(devices)}")


def _listed(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))
