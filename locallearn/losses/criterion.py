"""InfoNCE as a module."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from locallearn.losses import _checks
from locallearn.losses.contrastive import Form, Gather, Precision, Reduction, SameLabel, info_nce


class InfoNCE(nn.Module):
    """`info_nce` with its settings, which are explained there.

    A learnable temperature is given as an `nn.Parameter`; another tensor becomes a buffer. `forward` takes the views
    and, as a last positional argument or by name, integer labels (N,). A deep copy names the same ``group``; a pickle
    cannot, and is refused: save the `state_dict`.

    Example:
        >>> import torch
        >>> loss = InfoNCE(temperature=0.2)
        >>> loss(torch.ones(4, 8), torch.ones(4, 8))
        tensor(1.9459)
        >>> loss
        InfoNCE(temperature=0.2, form='nt-xent', same_label='attract', reduction='mean', gather='auto', precision='single')
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
        group: dist.ProcessGroup | None = None,
        tile: int | None = None,
        precision: Precision = "single",
        return_top1: bool = False,
    ) -> None:
        super().__init__()
        _checks.check_settings(temperature, form, same_label, reduction, gather, tile, precision)
        _checks.check_group(gather, group)
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature)
        else:
            self.temperature = temperature
        self.form = form
        self.same_label = same_label
        self.reduction = reduction
        self.gather = gather
        self.group = group
        self.tile = tile
        self.precision = precision
        self.return_top1 = return_top1

    def forward(
        self,
        *views: Tensor,
        negatives: Tensor | None = None,
        labels: Tensor | None = None,
        return_top1: bool | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return `info_nce(*views, ...)` with the module's settings; `return_top1` may be set anew in each call."""
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
            group=self.group,
            tile=self.tile,
            precision=self.precision,
            return_top1=self.return_top1 if return_top1 is None else return_top1,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> InfoNCE:
        memo[id(self.group)] = self.group
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(deepcopy(self.__dict__, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise TypeError(
                "InfoNCE(group=) cannot be pickled: a process group belongs to running processes; save its "
                "state_dict(), or set its group to None before and back after"
            )
        return self.__dict__

    def extra_repr(self) -> str:
        temperature = "learnt" if isinstance(self.temperature, nn.Parameter) else self.temperature
        names = ("form", "same_label", "reduction", "gather", "precision")
        return f"temperature={temperature}, " + ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _are_labels(last: object) -> bool:
    return isinstance(last, Tensor) and last.dim() == 1 and not (last.is_floating_point() or last.is_complex())
