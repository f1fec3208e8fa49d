"""Does a local gradient point where the end-to-end one does, and do the units that share a stage agree?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import isfinite, nan
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from locallearn._fitting.batches import View, plain_views
from locallearn._walk.trees import mapped
from locallearn.diagnosis.measures import single
from locallearn.diagnosis.picture import colour, panels, write
from locallearn.diagnosis.reading import check_wrapped
from locallearn.testing.copies import copied, replayed
from locallearn.testing.reference import forward, graph, penalty_of, weights_of_stages
from locallearn.wrapper import LocalWrapper

Gradients = dict[int, Tensor]  # by the weight's id


@dataclass(frozen=True)
class Agreement:
    """Two gradients of the same weights, as two long vectors.

    Attributes:
        cosine: of the angle between them: 1 where they point the same way, below 0 where they are in conflict; ``None``
            if one is zero, nan if one is not finite.
        norm_ratio: the length of the first one over the second's; ``None`` if that is zero, nan if one is not finite.
    """

    cosine: float | None
    norm_ratio: float | None


@dataclass(frozen=True)
class StageAgreement:
    """One stage of a :class:`GradientAgreement`.

    Attributes:
        ends_after: the submodule after which the stage ends.
        whole: the local gradient of all its weights, and the end-to-end one.
        groups: likewise of each group of parameters, by name.
        units: two units that both update it, the upper one's gradient and the lower one's.
    """

    ends_after: str
    whole: Agreement
    groups: dict[str, Agreement]
    units: dict[tuple[int, int], Agreement]


@dataclass(frozen=True)
class GradientAgreement:
    """What :func:`gradient_agreement` has found; ``print`` it, or ``save`` it as a picture.

    Attributes:
        stages: from the lowest to the top one.
        losses: of the units.
    """

    stages: tuple[StageAgreement, ...]
    losses: tuple[float, ...]

    def __str__(self) -> str:
        lines = [f"{'local against end-to-end':34} {'cosine':>8} {'norm ratio':>11}"]
        for number, stage in enumerate(self.stages):
            lines.append(_line(f"stage {number}, ends after {stage.ends_after}", stage.whole))
            lines += [_line(f"    {name}", agreement) for name, agreement in stage.groups.items()]
        if shared := [(number, stage) for number, stage in enumerate(self.stages) if stage.units]:
            lines += ["", f"{'units that share a stage':34} {'cosine':>8} {'upper/lower':>11}"]
            for number, stage in shared:
                lines += [_line(f"stage {number}, units {a} and {b}", found) for (a, b), found in stage.units.items()]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, as ``json.dump`` takes them."""
        stages = []
        for stage in self.stages:
            units = [{"units": list(pair), **asdict(agreement)} for pair, agreement in stage.units.items()]
            groups = {name: asdict(agreement) for name, agreement in stage.groups.items()}
            stages.append({"ends_after": stage.ends_after, **asdict(stage.whole), "groups": groups, "units": units})
        return {"stages": stages, "losses": list(self.losses)}

    def save(self, path: str | PathLike[str], beside: Mapping[str, GradientAgreement] | None = None) -> None:
        """Draws both cosines over the stages.

        Args:
            path: of the picture.
            beside: other reports to compare with, by name, such as ``{"overlap 0": ..., "overlap 1": ...}``; then this one is
                ``"this one"`` unless it is among them.

        Raises:
            ModuleNotFoundError: without matplotlib.
            ValueError: for a format that matplotlib does not have.
        """
        asked = "Does the local gradient point where the end-to-end one does?"
        figure, (left, right) = panels("GradientAgreement.save", asked, count=2, size=(11, 4.4))
        reports = dict(beside or {})
        if not any(report is self for report in reports.values()):
            reports = {"this one" if reports else "all weights": self, **reports}
        for number, (name, report) in enumerate(reports.items()):
            whole = [_number(stage.whole.cosine) for stage in report.stages]
            left.plot(range(len(whole)), whole, marker="o", color=colour(number), label=name, zorder=3)
            pairs = [(s, found.cosine) for s, stage in enumerate(report.stages) for found in stage.units.values()]
            right.plot([s for s, _ in pairs], [_number(c) for _, c in pairs], "o", color=colour(number), label=name)
        if len(reports) == 1:
            groups = dict.fromkeys(name for stage in self.stages for name in stage.groups)
            for number, name in enumerate(groups):
                own = [(s, stage.groups[name].cosine) for s, stage in enumerate(self.stages) if name in stage.groups]
                xs, ys = [s for s, _ in own], [_number(c) for _, c in own]
                left.plot(xs, ys, "x", color=colour(number + 1), label=name)
        left.set(ylabel="cosine", title="local against end-to-end, by stage")
        right.set(ylabel="cosine", title="the units that meet in a stage, against each other")
        if not any(stage.units for report in reports.values() for stage in report.stages):
            right.annotate("no two units share a stage", (0.5, 0.6), xycoords="axes fraction", ha="center")
        for panel in (left, right):
            panel.axhline(0, color="0.6", linewidth=0.8)
            panel.set(ylim=(-1.08, 1.08), xlim=(-0.4, len(self.stages) - 0.6), xlabel="stage that ends after")
            names = [stage.ends_after for stage in self.stages]
            panel.set_xticks(range(len(names)), names, rotation=20 if max(map(len, names)) > 8 else 0)
        left.legend(loc="lower left")
        right.annotate("in conflict", (0.02, 0.03), xycoords="axes fraction", color="0.4")
        right.annotate("of one mind", (0.02, 0.94), xycoords="axes fraction", color="0.4")
        write(figure, "GradientAgreement.save", path)


def _line(name: str, agreement: Agreement) -> str:
    cosine, ratio = (
        "" if x is None else f"{x:+.3f}" if sign and isfinite(x) else f"{x:.3g}"
        for x, sign in ((agreement.cosine, True), (agreement.norm_ratio, False))
    )
    return f"{name:34} {cosine:>8} {ratio:>11}".rstrip()


def _number(value: float | None) -> float:
    return torch.nan if value is None else value


def gradient_agreement(
    model: LocalWrapper,
    *views: View,
    targets: Any = None,
    groups: Callable[[str, nn.Parameter], str] | None = None,
) -> GradientAgreement:
    """How a local pass's gradients lie to those of end-to-end training, stage by stage, and the units' to each other.

    The local gradient of a weight is the one that :meth:`~locallearn.LocalWrapper.local_step` adds to ``.grad``, a
    penalty's included. The end-to-end one is that of the top unit's loss, with nothing cut below it. Both are of one batch,
    in the precision and the mode in which the model is, so they are noisy as any gradient of one batch is. Where only the top
    unit trains a stage, they are the same.

    Everything runs on a deep copy: ``.grad``, buffers, modes and random state stay as they are. It takes the whole
    network's graph and a copy of the weights; a part of a batch will do.

    Args:
        model: a wrapped backbone.
        views: as for ``local_step``.
        targets: as for ``local_step``.
        groups: ``groups(name, weight)`` names the group of a weight of the backbone; by default the type of its module.

    Raises:
        TypeError: if the model is not wrapped, a view is neither a tensor nor a tuple or mapping of some, or ``groups`` cannot
            be called.
        ValueError: without views.
        RuntimeError: if the model cannot be copied.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 8))
        >>> model = LocalWrapper(net, [1, 2, 3], overlap=1, decoder=nn.LazyLinear, example=torch.rand(2, 4))
        >>> top = gradient_agreement(model, torch.rand(5, 4), torch.rand(5, 4)).stages[-1]
        >>> round(top.whole.cosine, 3), round(top.whole.norm_ratio, 3)
        (1.0, 1.0)
    """
    check_wrapped(model)
    if groups is not None and not callable(groups):
        raise TypeError(f"groups is called with the name and the weight, and returns the group's name; got {groups!r}")
    with replayed():
        inputs = [mapped(lambda tensor: tensor.detach().clone(), view) for view in plain_views(views)]
        copy = copied(model)
        named = groups or _by_type(copy.backbone)
        outlets, losses = forward(copy, inputs, targets)
        penalty = penalty_of(copy)
        stages = weights_of_stages(outlets)
        with torch.autocast(losses[0].device.type, enabled=False):
            units = [
                _gradients(loss, [weight for stage in unit.updates for weight in stages[stage]])
                for unit, loss in zip(copy.plan.units, losses, strict=True)
            ]
            whole = _gradients(losses[-1], [weight for stage in stages for weight in stage])
            local = _sum([*units, *([] if penalty is None else [_gradients(penalty, graph(penalty)[0])])])
    of_stage = {id(weight): number for number, weights in enumerate(stages) for weight in weights}
    ordered = [(name, weight) for name, weight in copy.backbone.named_parameters() if id(weight) in of_stage]
    found = []
    for number, name in enumerate(copy.stages):
        own = [(path, weight) for path, weight in ordered if of_stage[id(weight)] == number]
        by_name: dict[str, list[nn.Parameter]] = {}
        for path, weight in own:
            by_name.setdefault(named(path, weight), []).append(weight)
        trained_by = [k for k, unit in enumerate(copy.plan.units) if number in unit.updates]
        found.append(
            StageAgreement(
                name,
                _compared([weight for _, weight in own], local, whole),
                {group: _compared(weights, local, whole) for group, weights in by_name.items()},
                {
                    (a, b): _compared([weight for _, weight in own], units[b], units[a])
                    for a, b in combinations(trained_by, 2)
                },
            )
        )
    return GradientAgreement(tuple(found), tuple(float(loss.detach()) for loss in losses))


def _by_type(backbone: nn.Module) -> Callable[[str, nn.Parameter], str]:
    modules = dict(backbone.named_modules(remove_duplicate=False))
    return lambda name, weight: type(modules[name.rpartition(".")[0]]).__name__


def _gradients(root: Tensor, weights: Sequence[Tensor]) -> Gradients:
    if not (weights and root.requires_grad):
        return {}
    gradients = torch.autograd.grad(root, list(weights), retain_graph=True, allow_unused=True)
    return {id(weight): gradient for weight, gradient in zip(weights, gradients, strict=True) if gradient is not None}


def _sum(all_gradients: Iterable[Gradients]) -> Gradients:
    total: Gradients = {}
    for gradients in all_gradients:
        for weight, gradient in gradients.items():
            total[weight] = total[weight] + gradient if weight in total else gradient
    return total


def _compared(weights: Sequence[Tensor], one: Gradients, other: Gradients) -> Agreement:
    """Sums of products over all weights; one that has no gradient has a gradient of zeros."""
    product = mine = theirs = 0.0
    for weight in weights:
        a, b = (None if (g := known.get(id(weight))) is None else _flat(g) for known in (one, other))
        mine += 0.0 if a is None else float(a.square().sum(dtype=torch.float64))
        theirs += 0.0 if b is None else float(b.square().sum(dtype=torch.float64))
        product += 0.0 if a is None or b is None else float((a * b).sum(dtype=torch.float64))
    if not (mine and theirs):
        return Agreement(None, 0.0 if theirs else None)
    if not isfinite(mine + theirs):
        return Agreement(nan, nan)
    cosine = max(-1.0, min(1.0, product / (mine**0.5 * theirs**0.5)))
    return Agreement(cosine, (mine / theirs) ** 0.5)


def _flat(gradient: Tensor) -> Tensor:
    dense = single(gradient.to_dense())
    return (torch.view_as_real(dense) if dense.is_complex() else dense).flatten().cpu()
