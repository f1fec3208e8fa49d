"""InfoNCE in all its forms: NT-Xent, CLIP's two directions, MoCo's queue, SupCon."""

from __future__ import annotations

from functools import reduce
from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from locallearn.distributed import row_counts
from locallearn.losses import _checks
from locallearn.losses._forms import Settings, against_given, in_batch
from locallearn.losses._precision import LN2, full_precision
from locallearn.losses._rows import transformed

Form = Literal["nt-xent", "two-way", "one-way"]
SameLabel = Literal["attract", "ignore"]
Reduction = Literal["none", "sum", "mean"]
Precision = Literal["single", "input"]
Gather = bool | Literal["auto"]


@overload
def info_nce(
    *views: Tensor,
    temperature: float | Tensor = ...,
    negatives: Tensor | None = ...,
    labels: Tensor | None = ...,
    form: Form = ...,
    same_label: SameLabel = ...,
    reduction: Reduction = ...,
    gather: Gather = ...,
    group: dist.ProcessGroup | None = ...,
    tile: int | None = ...,
    precision: Precision = ...,
    return_top1: Literal[False] = ...,
) -> Tensor: ...


@overload
def info_nce(
    *views: Tensor,
    temperature: float | Tensor = ...,
    negatives: Tensor | None = ...,
    labels: Tensor | None = ...,
    form: Form = ...,
    same_label: SameLabel = ...,
    reduction: Reduction = ...,
    gather: Gather = ...,
    group: dist.ProcessGroup | None = ...,
    tile: int | None = ...,
    precision: Precision = ...,
    return_top1: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def info_nce(
    *views: Tensor,
    temperature: float | Tensor = ...,
    negatives: Tensor | None = ...,
    labels: Tensor | None = ...,
    form: Form = ...,
    same_label: SameLabel = ...,
    reduction: Reduction = ...,
    gather: Gather = ...,
    group: dist.ProcessGroup | None = ...,
    tile: int | None = ...,
    precision: Precision = ...,
    return_top1: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def info_nce(
    *views: Tensor,
    temperature: float | Tensor = 0.1,
    negatives: Tensor | None = None,
    labels: Tensor | None = None,
    form: Form = "nt-xent",
    same_label: SameLabel = "attract",
    reduction: Reduction = "mean",
    gather: Gather = "auto",
    group: dist.ProcessGroup | None = None,
    tile: int | None = None,
    precision: Precision = "single",
    return_top1: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""How hard it is to tell an embedding's positive from its negatives, in nats.

    Each row ``i`` of a view is an anchor. With ``s_ij = cosine(z_i, z_j) / temperature`` and the positive ``p(i)``,
    which is the same row of the other view, its loss is::

        l_i = -log( exp(s_ip) / (exp(s_ip) + sum over negatives j of exp(s_ij)) ) = softplus(logsumexp_j s_ij - s_ip)

    ============================  ==================  ==============================  ==========  ================
    call                          anchors             negatives of an anchor          shape (1)   at random (2)
    ============================  ==================  ==============================  ==========  ================
    ``info_nce(z0, z1)``          rows of both views  other rows of both views        (2, N)      log(2N - 1)
    ``form="two-way"``            rows of both views  other rows of the other view    (2, N)      log(N)
    ``form="one-way"``            rows of ``z0``      other rows of ``z1``            (N,)        log(N)
    ``negatives=`` (M, D)         rows of ``z0``      all of the queue                (N,)        log(M + 1)
    ``negatives=`` (N, M, D)      rows of ``z0``      the M of its own                (N,)        log(M + 1)
    ============================  ==================  ==============================  ==========  ================

    (1) with ``reduction="none"``; (2) where all similarities are equal. The first is SimCLR's NT-Xent, the second
    CLIP's, the third equation (1) of LoCo, the fourth MoCo's. More than two views, or ``labels``, make several
    positives: the loss is SupCon's, ``-mean_p log(exp(s_ip) / sum over all others of exp(s_ij))``; a row without any
    positive has loss zero.

    Compared with others, given equal temperatures: ``lightly.loss.NTXentLoss`` (default temperature 0.5) is the first
    form; ``open_clip.ClipLoss`` is the second, with ``logit_scale = 1 / temperature`` on rows that its caller has
    normalised; ``info_nce.InfoNCE`` (info-nce-pytorch) is the third to fifth; google-research/simclr adds up the two
    views' means, which is twice the first.

    The similarities are computed in tiles, in forward and again in backward, and never held together: memory is of
    order N D, kept between the two are the normalised rows; a small matrix (2,048 rows on a CPU) is kept too. All arithmetic
    is at least single precision, also under autocast (``torch.set_float32_matmul_precision`` does apply), unless
    ``precision="input"``. What training leaves of a probability, one minus the softmax, is never computed by
    subtraction. Rows may have any length that their type can hold; a row of zeros gets a zero gradient. NaN in gives
    NaN out, as does a learnable temperature below zero: no check reads values.

    Second derivatives need ``tile=0``. Forward-mode derivatives and ``torch.func`` (``grad``, ``vmap``, ``jvp``, ...)
    are right, and build the whole matrix, as ``tile=0`` does.

    Under ``torch.distributed`` every rank's rows are negatives. What the ranks return averages to the loss of the whole
    batch, and so does DistributedDataParallel with the gradients. A ``mean`` or ``sum`` without labels needs no
    collective in backward, and takes for granted that the ranks scale their losses alike. Ranks may have different N.
    ``negatives`` are taken as they are, and nothing is gathered. With ``group`` all this is true of the group's ranks.
    All of them have to call the loss equally often: DistributedDataParallel's ``join()`` does not answer for a rank
    that has run out of data, and the others wait for it. Inside of such a module's forward that is refused.

    Args:
        *views: (N, D) embeddings, any floating-point type, not normalised; two views or more, or one with ``labels``.
        temperature: a number, or a tensor of one element, which may be learnt. SimCLR's ImageNet value is 0.1.
        negatives: used instead of the batch's own: a queue (M, D), or (N, M, D), M for each row of ``z0``.
        labels: (N,) integers, the same for all views.
        form: which rows meet, see the table.
        same_label: whether rows of one label ``"attract"`` each other as positives (SupCon), or ``"ignore"`` each
            other, being neither positives nor negatives (as patches of one image, say).
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, which keeps one loss per anchor.
        gather: ``"auto"`` takes every rank's rows where ``torch.distributed`` is initialised; ``True`` insists on it;
            ``False`` stays with this process.
        group: the process group whose rows are negatives, by default all ranks. Each rank names one that it is in.
        tile: rows and columns of a tile; ``None`` chooses by device, ``0`` builds the whole matrix: the reference.
        precision: ``"single"``, or ``"input"``: rows of half precision are multiplied in their own type, and added up in
            single precision, as is all else. Faster on GPUs (torch 2.8 or newer), and less exact: see the docs' table.
        return_top1: return also the contrastive top-1 accuracy: the share of this rank's anchors whose most similar
            row, among all candidates, is a positive (with ``reduction="none"``, which ones). It comes from the same
            pass, without another product; a tie is not right, nor is a row without a positive.

    Returns:
        The loss, single precision or better; with ``return_top1``, the loss and the accuracy, a scalar between 0 and 1
        without a gradient.

    Raises:
        ValueError: shapes or settings that do not fit, or too few pairs; the message says which.
        TypeError: embeddings that are not floating-point tensors, labels that are not integer tensors.

    References:
        Chen et al., *SimCLR*, 2020 (NT-Xent); van den Oord et al., *CPC*, 2018 (InfoNCE); He et al., *MoCo*, 2020;
        Radford et al., *CLIP*, 2021; Khosla et al., *SupCon*, 2020, equation (2).

    Example:
        >>> z0 = z1 = torch.ones(4, 8)
        >>> info_nce(z0, z1)  # nothing to tell apart: log(2 * 4 - 1)
        tensor(1.9459)
        >>> loss, top1 = info_nce(torch.eye(4), torch.eye(4), return_top1=True)
        >>> top1
        tensor(1.)
    """
    _checks.check_settings(temperature, form, same_label, reduction, gather, tile, precision)
    _checks.check_views(views)
    if negatives is not None:
        _checks.check_negatives(negatives, views, labels, form)
    if labels is not None:
        _checks.check_labels(labels, views, same_label)
    everywhere = _checks.gathers(gather, group, negatives)
    _checks.check_pairs(views, labels, form, needed=2 if negatives is None and not everywhere else 1)

    given = views if negatives is None else (*views, negatives)
    if transformed(*given, *([temperature] if isinstance(temperature, Tensor) else [])):
        _checks.check_alone(everywhere)
        tile = 0
    narrowest = reduce(torch.promote_types, (x.dtype for x in given))
    dtype = torch.promote_types(narrowest, torch.float32)
    products = narrowest if precision == "input" and narrowest != dtype else None
    bounded = not isinstance(temperature, Tensor) and temperature * LN2 * 59 >= 1  # within 60 bits when rounded
    attract, alike = same_label == "attract", reduction != "none"
    how = Settings(form, temperature, bounded, attract, alike, tile, return_top1, products, group)
    with full_precision(views[0].device):
        inputs = [view.to(dtype) for view in views]
        counts = row_counts(inputs[0], group) if everywhere else [inputs[0].shape[0]]
        if negatives is not None:
            losses, right = against_given(inputs, negatives.to(dtype), how)
        else:
            losses, right = in_batch(inputs, counts, labels, how)
            if form == "one-way":
                losses, right = losses.squeeze(0), right.squeeze(0)
        # what each rank returns averages to the loss of them all; so does DistributedDataParallel
        if reduction == "sum":
            losses = losses.sum() * len(counts)
        elif reduction == "mean":
            losses = losses.sum() / (losses.numel() * sum(counts) / (len(counts) * views[0].shape[0]))
    if not return_top1:
        return losses
    return losses, right if reduction == "none" else right.float().mean()
