"""Where to cut a backbone: stages found, weighed and chosen before anything is trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil, inf
from numbers import Real
from typing import Any

from torch import Tensor, nn

from locallearn._fitting.attach import Decoder
from locallearn._fitting.batches import View, example_batch, rows
from locallearn._fitting.chain import Link, longest
from locallearn._fitting.features import Features, Which
from locallearn._fitting.outlets import check_graph
from locallearn._fitting.recomputed import Policy, runs
from locallearn._walk.trees import mapped
from locallearn.memory.balance import balanced, stage_flops
from locallearn.memory.between import between, hands_on
from locallearn.memory.pieces import Piece, Sample
from locallearn.memory.places import places, trained
from locallearn.memory.predict import predict, size
from locallearn.plan import Plan, whole
from locallearn.schedules import sequential


@dataclass(frozen=True)
class StagePlan:
    """Cuts that :func:`plan_stages` has chosen, and what training on them is predicted to take; ``print`` it.

    Attributes:
        stages: the names of the submodules after which the stages end, for ``LocalWrapper(model, stages=...)``.
        plan: what it was chosen for.
        pieces: what the stages are made of, stage by stage.
        recomputed: the same pieces under ``checkpoint=``.
        left_out: submodules whose weights lie behind the last cut, or beside all stages, and are not trained.
        ranks: how many stages each process of a :class:`locallearn.pipeline.Pipeline` gets, if they were chosen for one.
    """

    stages: tuple[str, ...]
    plan: Plan
    pieces: tuple[tuple[Piece, ...], ...]
    recomputed: tuple[tuple[Piece, ...], ...]
    left_out: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()

    def peak(self, overlap: int | None = None, *, checkpoint: bool = False) -> float:
        """The predicted peak of live bytes of a step, without weights, their gradients and the images.

        Args:
            overlap: as in ``LocalWrapper``, 0 for Greedy InfoMax, ``len(stages) - 1`` for SimCLR; that of the plan by default.
            checkpoint: whether blocks are recomputed.
        """
        plan = self.plan if overlap is None else Plan.windows(len(self.stages), overlap)
        return _peak(plan, self.recomputed if checkpoint else self.pieces)

    def __str__(self) -> str:
        total = sum(piece.flops for stage in self.pieces for piece in stage)
        lines = [f"{'stage':>5}  {'ends after':24} {'outlet':>22} {'FLOPs':>7} {'kept, MB':>9} {'recomputed':>11}"]
        for number, (end, stage, lean) in enumerate(zip(self.stages, self.pieces, self.recomputed, strict=True)):
            share = sum(piece.flops for piece in stage) / total
            kept, left = (sum(piece.kept for piece in part) / 1e6 for part in (stage, lean))
            shape = str(tuple(stage[-1].shape))
            lines.append(f"{number:>5}  {end:24} {shape:>22} {share:>7.1%} {kept:>9,.0f} {left:>11,.0f}")
        numbers = sum(piece.weights for stage in self.pieces for piece in stage)
        lines.append(f"trained: {numbers:,} weights; left out: {', '.join(self.left_out) or 'none'}")
        lines.append("")
        lines.append(f"{'predicted peak, MB':34} {'plain':>8} {'':>7} {'recomputed':>11}")
        top = len(self.stages) - 1
        base = self.peak(top)
        named = {"end-to-end (SimCLR)": top, "Greedy InfoMax (overlap=0)": 0, "LoCo (overlap=1)": min(1, top)}
        for name, overlap in named.items():
            peaks = self.peak(overlap), self.peak(overlap, checkpoint=True)
            lines.append(
                f"{name:34} {peaks[0] / 1e6:>8,.0f} {base / peaks[0]:>6.2f}x {peaks[1] / 1e6:>11,.0f} {base / peaks[1]:>6.2f}x"
            )
        if self.ranks:
            costs = [stage_flops(self.plan, s, stage) for s, stage in enumerate(self.pieces)]
            ends = list(accumulate(self.ranks, initial=0))
            shares = [f"{sum(costs[a:b]) / sum(costs):.1%}" for a, b in pairwise(ends)]
            lines += ["", f"FLOPs of a step, rank by rank: {', '.join(shares)}"]
        return "\n".join(lines)


def plan_stages(
    model: nn.Module,
    example: View | Sequence[View] | None = None,
    n: int | None = None,
    overlap: int = 1,
    budget: float | None = None,
    *,
    ranks: int | None = None,
    decoder: Decoder = "auto",
    checkpoint: Policy = False,
    channel_axis: int | None = None,
    features: Which = None,
) -> StagePlan:
    """Finds where ``model`` can be cut, weighs what lies between, and picks the cuts.

    A backbone can be cut after every submodule after which nothing is needed but what it returns; blocks stay whole, and so
    do simple layers with the convolution before them. The last stage ends with the last map of features; the pooling and the
    classifier that follow are left out. All is counted in one forward of the first two inputs, in eval mode and without a
    trace, and multiplied: seconds, and the memory of a step with two inputs.

    Args:
        model: the backbone; it is left as it is.
        example: a batch as large as those that will be trained on, all views in one, or a list of views; as in
            ``LocalWrapper``. By default 64 RGB images of 224 pixels, such as two views of 32.
        n: how many stages; 4 by default, or ``overlap + 1`` a rank.
        overlap: how many of them neighbouring units share.
        budget: ``None`` looks for the lowest peak, and for even computation among those cuts that share it. A number of
            bytes looks for the most even computation among the cuts whose peak fits; ``math.inf`` for that alone.
        ranks: for a pipeline of as many processes, each of which gets ``n / ranks`` stages: looks for the cuts with which the
            one that has most to compute has least. A rank computes its forwards, the gradients of its weights, one input
            gradient for each unit that walks on, and its decoders.
        decoder: as in ``LocalWrapper``, but no list.
        checkpoint: as in ``LocalWrapper``: with it, the cuts are chosen for what is recomputed.
        channel_axis: as in ``LocalWrapper``.
        features: as in ``LocalWrapper``.

    Raises:
        TypeError: if ``n``, ``overlap`` or ``ranks`` is no whole number, or ``budget`` no number.
        ValueError: if the model does not run on ``example``, if it has not enough places, if nothing fits into the budget,
            or if ``ranks`` does not divide ``n``.

    Example:
        >>> import torch
        >>> net = nn.Sequential(*[nn.Conv2d(3 if k == 0 else 8, 8, 3, padding=1) for k in range(6)])
        >>> plan_stages(net, torch.zeros(8, 3, 16, 16), n=3).stages
        ('2', '3', '5')
    """
    check_graph(model)
    n = _stages(n, overlap, budget, ranks)
    batch = sixty_four(model, None) if example is None else example_batch(model, example)
    sample = Sample(model, batch, features=Features(features))
    found = runs(model, (), checkpoint or True, sample.inputs, [link for link in sample.chain if len(link.forms) == 1])
    ends = list[Link]()
    for end in places(model, sample.chain, sample.rows, found):
        if not (ends and hands_on(end, ends[-1])):
            ends.append(end)
    if len(ends) < n:
        raise ValueError(_too_few(model, sample, n, ends))
    plain, lean = sample.pieces(ends, found)
    plain = [sample.decoded(piece, end, decoder, channel_axis) for piece, end in zip(plain, ends, strict=True)]
    lean = [
        piece._replace(train=known.train, decoder_flops=known.decoder_flops)
        for piece, known in zip(lean, plain, strict=True)
    ]
    plan = Plan.windows(n, overlap)
    if ranks is None:
        best = _best(plan, lean if checkpoint else plain, inf if budget is None else budget, peak_first=budget is None)
    else:
        best = balanced(plain, plan, ranks)
    if not best:
        raise ValueError(
            _misfit(sample, [end for end, piece in zip(ends, plain, strict=True) if piece.train == inf][-1])
        )
    bounds = [0, *best]
    return StagePlan(
        tuple(plain[end - 1].end for end in best),
        plan,
        tuple(tuple(plain[a:b]) for a, b in pairwise(bounds)),
        tuple(tuple(lean[a:b]) for a, b in pairwise(bounds)),
        _left_out(model, {id(weight) for weight in between(ends[-1]).weights}),
        () if ranks is None else (n // ranks,) * ranks,
    )


def automatic(
    model: nn.Module, plan: Plan, decoder: Decoder, checkpoint: Policy, example: Any, axis: int | None
) -> tuple[str, ...]:
    """The cuts that ``LocalWrapper(stages="auto")`` takes."""
    if decoder != "auto" and (not callable(decoder) or isinstance(decoder, nn.Module)):
        raise TypeError(f"stages='auto' needs a decoder= that makes a module from a width; got {decoder!r}")
    overlap = max(unit.last - unit.first for unit in plan.units)
    batch = sixty_four(model, example)
    chosen = plan_stages(model, batch, plan.stages, overlap, decoder=decoder, checkpoint=checkpoint, channel_axis=axis)
    return chosen.stages


def _stages(n: int | None, overlap: int, budget: float | None, ranks: int | None) -> int:
    overlap = whole("overlap", overlap)
    n = None if n is None else whole("n, the number of stages,", n, 1)
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, Real)):
        raise TypeError(f"budget is a number of bytes, such as 8e9; got {budget!r}")
    if budget is not None and not budget > 0:
        raise ValueError(f"budget is a number of bytes, more than 0; got {budget}")
    if ranks is None:
        return Plan.windows(4 if n is None else n, overlap).stages
    ranks = whole("ranks", ranks)
    if ranks < 1 or budget is not None:
        raise ValueError(
            f"ranks is how many processes a pipeline has, and goes without budget=; got {ranks=}, {budget=}"
        )
    n = ranks * (overlap + 1) if n is None else n
    if n % ranks:
        raise ValueError(f"each of {ranks} ranks gets as many stages; {n} cannot be divided up like that")
    return n


def sixty_four(model: nn.Module, example: View | Sequence[View] | None) -> Any:
    """The first of ``example``'s inputs, as a batch of 64, which takes no more memory."""
    batch = example_batch(model, example)
    length = rows(batch)

    def many(tensor: Tensor) -> Tensor:
        return tensor[:1].expand(64, *tensor.shape[1:]) if tensor.ndim and len(tensor) == length else tensor

    return mapped(many, batch)


def _left_out(model: nn.Module, reached: Collection[int]) -> tuple[str, ...]:
    """The outermost submodules all of whose trainable weights are not ``reached``."""
    found: list[str] = []
    for name, module in model.named_modules():
        ours = [id(weight) for weight in module.parameters() if weight.requires_grad]
        if ours and not any(weight in reached for weight in ours) and not any(name.startswith(f"{f}.") for f in found):
            found.append(name)
    return tuple(found)


def _too_few(model: nn.Module, sample: Sample, n: int, ends: Sequence[Link]) -> str:
    told = f"{n} stages need as many pieces, but the model can only be cut after {[end.end for end in ends]}"
    behind = sample.chain[sample.chain.index(ends[-1]) + 1 :] if ends else []
    if any(len(link.outlet.shape) > 2 and trained(model, link) for link in behind):
        return (
            f"{told}: what follows sees maps of a single position, which a pooling makes, too. Give larger inputs (example=), or "
            "name the stages"
        )
    below = longest(model, sample.inputs, Features())
    if len(below) > len(sample.chain) and len(below) >= n:
        told += (
            f". Up to {below[-1].end!r} more would do, but tensors from there are needed until the end, as over a U-Net's skip "
            "connections. Give that part alone, as a backbone of its own, or name the stages"
        )
    return told


def _misfit(sample: Sample, end: Link) -> str:
    return (
        f"decoder= fits too few outlets at which units could end. Not that of {end.end!r}: {sample.misfits[end.outlet.shape]}. "
        "Leave decoder= away, for decoders that are chosen by the outlets' shapes"
    )


def _peak(plan: Plan, stages: Sequence[Sequence[Piece]]) -> float:
    return max(phase.peak for phase in predict(plan, sequential(plan), stages))


def _best(plan: Plan, pieces: Sequence[Piece], budget: float, *, peak_first: bool) -> tuple[int, ...]:
    """How many pieces lie up to the end of each stage: by branch and bound, exact; nothing, if decoders fit nowhere.

    The stages are chosen from the bottom. The lowest units alone take no more than they do among all, so what they take
    bounds what can come of a beginning. So does what is left: one of the units above keeps its share of it at least.
    """
    n, overlap = plan.stages, len(plan.units[0].updates) - 1
    kept = [sum(piece.kept for piece in pieces[end:]) for end in range(len(pieces) + 1)]
    flops = [sum(piece.flops for piece in pieces[end:]) for end in range(len(pieces) + 1)]
    best: tuple[float, float, tuple[int, ...]] = (inf, inf, ())

    def ordered(peak: float, most: float) -> tuple[float, float]:
        return (peak, most) if peak_first else (most, peak)

    def better(peak: float, most: float) -> bool:
        return peak <= budget and peak < inf and ordered(peak, most) < best[:2]

    def extend(ends: tuple[int, ...], peak: float, most: float) -> None:
        nonlocal best
        left = n - len(ends)
        for end in [len(pieces)] if left == 1 else range((ends or (0,))[-1] + 1, len(pieces) - left + 2):
            chosen = (*ends, end)
            highest = max(peak, kept[end] / max(1, ceil((left - 1) / (overlap + 1))))
            heaviest = max(most, flops[chosen[-2] if ends else 0] - flops[end], flops[end] / max(1, left - 1))
            if better(highest, heaviest) and len(chosen) > overlap:
                stages = [pieces[a:b] for a, b in pairwise((0, *chosen))]
                highest = max(highest, _peak(Plan.windows(len(chosen), overlap), stages))
            if not better(highest, heaviest):
                continue
            if left == 1:
                best = (*ordered(highest, heaviest), chosen)
            else:
                extend(chosen, highest, heaviest)

    extend((), 0.0, 0.0)
    if not best[2] and budget < inf:
        ends = _best(plan, pieces, inf, peak_first=True)
        if not ends:
            return ()
        least = _peak(plan, [pieces[a:b] for a, b in pairwise((0, *ends))])
        raise ValueError(
            f"no cuts into {n} stages with overlap {overlap} fit into {size(budget)}; the least is {size(least)}. "
            "Try more stages, less overlap, or checkpoint=True"
        )
    return best[2]
