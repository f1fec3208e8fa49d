"""InfoNCE in all its forms: NT-Xent, CLIP's two directions, MoCo's queue, SupCon."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor, nn

from ..distributed import row_counts
from . import _checks
from ._forms import against_given, in_batch, length
from ._precision import LN2, full_precision

Form = Literal["nt-xent", "two-way", "one-way"]
SameLabel = Literal["attract", "ignore"]
Reduction = Literal["none", "sum", "mean"]
Gather = bool | Literal["auto"]


def info_nce(
    *views: Tensor,
    temperature: float | Tensor = 0.1,
    negatives: Tensor | None = None,
    labels: Tensor | None = None,
    form: Form = "nt-xent",
    same_label: SameLabel = "attract",
    reduction: Reduction = "mean",
    gather: Gather = "auto",
    tile: int | None = None,
    return_top1: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """DOC"""
    _checks.check_settings(temperature, form, same_label, reduction, gather, tile)
    _checks.check_views(views)
    if negatives is not None:
        _checks.check_negatives(negatives, views, labels, form)
    if labels is not None:
        _checks.check_labels(labels, views, same_label)
    everywhere = negatives is None and _checks.gathers(gather)
    _checks.check_pairs(views, labels, form, needed=2 if negatives is None and not everywhere else 1)

    with full_precision(views[0].device):
        *rows, others = _promoted([*views, views[0] if negatives is None else negatives])
        rows = [row / length(row, temperature) for row in rows]  # (N, D), whose dot products are logits in bits
        counts = row_counts(rows[0]) if everywhere else [rows[0].shape[0]]
        # logits within 60 bits, rounding included
        bounded = not isinstance(temperature, Tensor) and temperature * LN2 * 59 >= 1
        if negatives is not None:
            losses, right = against_given(rows, others, temperature, bounded, tile)
        else:
            alike = reduction != "none"
            losses, right = in_batch(rows, form, counts, labels, same_label == "attract", alike, bounded, tile)
            if form == "one-way":
                losses, right = losses[0], right[0]
        loss = _reduced(losses, reduction, counts)
    if not return_top1:
        return loss
    return loss, right if reduction == "none" else right.float().mean()


def _promoted(tensors: Sequence[Tensor]) -> list[Tensor]:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def _reduced(losses: Tensor, reduction: Reduction, counts: Sequence[int]) -> Tensor:
    """Of one rank's losses, what averages over the ranks to the loss of them all; so does DistributedDataParallel."""
    if reduction == "sum":
        return losses.sum() * len(counts)
    if reduction == "mean":
        return losses.mean() * (len(counts) * losses.shape[-1] / sum(counts))
    return losses


class InfoNCE(nn.Module):
    """DOC"""

    temperature: float | Tensor

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        form: Form = "nt-xent",
        same_label: SameLabel = "attract",
        reduction: Reduction = "mean",
        gather: Gather = "auto",
        tile: int | None = None,
        return_top1: bool = False,
    ) -> None:
        super().__init__()
        _checks.check_settings(temperature, form, same_label, reduction, gather, tile)
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature)
        else:
            self.temperature = temperature
        self.form = form
        self.same_label = same_label
        self.reduction = reduction
        self.gather = gather
        self.tile = tile
        self.return_top1 = return_top1

    def forward(
        self, *views: Tensor, negatives: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if labels is None and len(views) > 1 and _are_labels(views[-1]):
            views, labels = views[:-1], views[-1]
        return info_nce(
            *views,
            temperature=self.temperature,
            negatives=negatives,
            labels=labels,
            form=self.form,
            same_label=self.same_label,
            reduction=self.reduction,
            gather=self.gather,
            tile=self.tile,
            return_top1=self.return_top1,
        )


def _are_labels(last: object) -> bool:
    return isinstance(last, Tensor) and last.dim() == 1 and not (last.is_floating_point() or last.is_complex())
