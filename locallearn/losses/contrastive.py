"""InfoNCE in all its forms: NT-Xent, CLIP's two directions, MoCo's queue, SupCon."""

from functools import reduce
from typing import Literal, overload

import torch
from torch import Tensor, nn

from locallearn.distributed import row_counts
from locallearn.losses import _checks
from locallearn.losses._forms import against_given, in_batch, scale
from locallearn.losses._precision import LN2, full_precision

Form = Literal["nt-xent", "two-way", "one-way"]
SameLabel = Literal["attract", "ignore"]
Reduction = Literal["none", "sum", "mean"]
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
    tile: int | None = ...,
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
    tile: int | None = ...,
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
    tile: int | None = None,
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
    order N D, kept between the two are the normalised rows. All arithmetic is at least single precision, also under
    autocast (``torch.set_float32_matmul_precision`` does apply). What training leaves of a probability, one minus the
    softmax, is never computed by subtraction. A row of zeros gets a zero gradient; NaN in gives NaN out, as does a
    learnable temperature below zero: no check reads values. Second derivatives need ``tile=0``.

    Under ``torch.distributed`` every rank's rows are negatives. What the ranks return averages to the loss of the whole
    batch, and so does DistributedDataParallel with the gradients. A ``mean`` or ``sum`` without labels needs no
    collective in backward, and takes for granted that the ranks scale their losses alike. Ranks may have different N.
    ``negatives`` are taken as they are, and nothing is gathered.

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
        tile: rows and columns of a tile; ``None`` chooses by device, ``0`` builds the whole matrix: the reference.
        return_top1: return also the share of anchors whose nearest row is a positive, for logging (with
            ``reduction="none"``, which ones); it comes from the same pass, and a tie is not right.

    Returns:
        The loss, single precision or better; with ``return_top1``, the loss and the share.

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
    _checks.check_settings(temperature, form, same_label, reduction, gather, tile)
    _checks.check_views(views)
    if negatives is not None:
        _checks.check_negatives(negatives, views, labels, form)
    if labels is not None:
        _checks.check_labels(labels, views, same_label)
    everywhere = negatives is None and _checks.gathers(gather)
    _checks.check_pairs(views, labels, form, needed=2 if negatives is None and not everywhere else 1)

    with full_precision(views[0].device):
        given = views if negatives is None else (*views, negatives)
        dtype = reduce(torch.promote_types, (x.dtype for x in given), torch.float32)
        rows = [x * scale(x, temperature) for x in (view.to(dtype) for view in views)]  # (N, D), dot products are bits
        counts = row_counts(rows[0]) if everywhere else [rows[0].shape[0]]
        bounded = not isinstance(temperature, Tensor) and temperature * LN2 * 59 >= 1  # within 60 bits when rounded
        if negatives is not None:
            losses, right = against_given(rows, negatives.to(dtype), temperature, bounded, tile)
        else:
            alike = reduction != "none"
            losses, right = in_batch(rows, form, counts, labels, same_label == "attract", alike, bounded, tile)
            if form == "one-way":
                losses, right = losses[0], right[0]
        # what each rank returns averages to the loss of them all; so does DistributedDataParallel
        if reduction == "sum":
            losses = losses.sum() * len(counts)
        elif reduction == "mean":
            losses = losses.sum() / (right.numel() * sum(counts) / (len(counts) * rows[0].shape[0]))
    if not return_top1:
        return losses
    return losses, right if reduction == "none" else right.float().mean()


class InfoNCE(nn.Module):
    """`info_nce` with its settings, which are explained there.

    A learnable temperature is given as an `nn.Parameter`; another tensor becomes a buffer. `forward` takes the views
    and, as a last positional argument or by name, integer labels (N,).

    Example:
        >>> loss = InfoNCE(temperature=0.2)
        >>> loss(torch.ones(4, 8), torch.ones(4, 8))
        tensor(1.9459)
        >>> loss
        InfoNCE(temperature=0.2, form='nt-xent', same_label='attract', reduction='mean', gather='auto')
    """

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
        """Return `info_nce(*views, ...)` with the module's settings."""
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

    def extra_repr(self) -> str:
        temperature = "learnt" if isinstance(self.temperature, nn.Parameter) else self.temperature
        names = ("form", "same_label", "reduction", "gather")
        return f"temperature={temperature}, " + ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _are_labels(last: object) -> bool:
    return isinstance(last, Tensor) and last.dim() == 1 and not (last.is_floating_point() or last.is_complex())
