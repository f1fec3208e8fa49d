"""Where to cut a backbone: stages found, weighed and chosen before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from locallearn._fitting.batches import View, example_batch, rows
from locallearn._fitting.outlets import check_graph
from locallearn._fitting.recomputed import Policy, runs
from locallearn._walk.trees import mapped
from locallearn.decoders import ConvMLPDecoder
from locallearn.memory.balance import balanced, stage_flops
from locallearn.memory.fakes import analysed, fake_copy
from locallearn.memory.pieces import Piece, places, weigh
from locallearn.memory.predict import predict
from locallearn.plan import Plan
from locallearn.schedules import sequential


@dataclass(frozen=True)
class StagePlan:
    """Cuts that :func:`plan_stages` has chosen, and what training on them is predicted to take; ``print`` it.

    Attributes:
        stages: the names of the submodules after which the stages end, for ``LocalWrapper(model, stages=...)``.
        plan: what it was chosen for.
        pieces: what the stages are made of, stage by stage.
        recomputed: the same pieces under ``checkpoint=``.
        ranks: how many stages each process of a :class:`locallearn.pipeline.Pipeline` gets, if they were chosen for one.
    """

    stages: tuple[str, ...]
    plan: Plan
    pieces: tuple[tuple[Piece, ...], ...]
    recomputed: tuple[tuple[Piece, ...], ...]
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
    decoder: Callable[[int], nn.Module] = ConvMLPDecoder,
    checkpoint: Policy = False,
    channel_axis: int | None = None,
) -> StagePlan:
    """Finds where ``model`` can be cut, weighs what lies between, and picks the cuts.

    A backbone can be cut after every submodule over which exactly one tensor passes; blocks stay whole, and so do simple
    layers with the convolution before them. Everything is counted under fake tensors, in seconds and without memory.

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
        decoder: makes a unit's decoder from its outlet's width.
        checkpoint: as in ``LocalWrapper``: with it, the cuts are chosen for what is recomputed.
        channel_axis: as in ``LocalWrapper``.

    Raises:
        ValueError: if the model has not enough places, if nothing fits into the budget, or if ``ranks`` does not divide ``n``.

    Example:
        >>> net = nn.Sequential(*[nn.Conv2d(3 if k == 0 else 8, 8, 3, padding=1) for k in range(6)])
        >>> plan_stages(net, torch.zeros(8, 3, 16, 16), n=3).stages
        ('2', '3', '5')
    """
    check_graph(model)
    n = _stages(n, overlap, budget, ranks)
    batch = sixty_four(model, None) if example is None else example_batch(model, example)
    with analysed(model) as fake:
        plain, lean = _weighed(model, batch, decoder, channel_axis, checkpoint, fake)
    plan = Plan.windows(n, overlap)
    if ranks is None:
        best = _best(plan, lean if checkpoint else plain, inf if budget is None else budget, peak_first=budget is None)
    else:
        best = balanced(plain, plan, ranks)
    ends = [0, *best]
    return StagePlan(
        tuple(plain[end - 1].end for end in best),
        plan,
        tuple(tuple(plain[a:b]) for a, b in pairwise(ends)),
        tuple(tuple(lean[a:b]) for a, b in pairwise(ends)),
        () if ranks is None else (n // ranks,) * ranks,
    )


def _stages(n: int | None, overlap: int, budget: float | None, ranks: int | None) -> int:
    if ranks is None:
        return 4 if n is None else n
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


def automatic(
    model: nn.Module, plan: Plan, decoder: Any, checkpoint: Policy, example: Any, axis: int | None
) -> tuple[str, ...]:
    """The cuts that ``LocalWrapper(stages="auto")`` takes."""
    if not callable(decoder) or isinstance(decoder, nn.Module):
        raise TypeError(f"stages='auto' needs a decoder= that makes a module from a width; got {decoder!r}")
    overlap = max(unit.last - unit.first for unit in plan.units)
    batch = sixty_four(model, example)
    chosen = plan_stages(model, batch, plan.stages, overlap, decoder=decoder, checkpoint=checkpoint, channel_axis=axis)
    return chosen.stages


def _weighed(
    model: nn.Module,
    batch: Any,
    decoder: Callable[[int], nn.Module],
    axis: int | None,
    checkpoint: Policy,
    fake: FakeTensorMode,
) -> tuple[list[Piece], list[Piece]]:
    """Every piece as it is, and recomputed."""
    copied = fake_copy(model, fake)
    policy = checkpoint or True
    with fake:
        images = mapped(lambda t: torch.zeros(t.shape, dtype=t.dtype, device=t.device), batch)
        ends = places(copied, images, policy)
        if not any(module.training for module in copied.modules()):
            copied.train()
        chosen = runs(copied, [end.end for end in ends], policy, images)
        plain = weigh(copied, images, ends, decoder, axis)
        try:
            lean = weigh(copied, images, ends, None, axis, chosen)
        except RuntimeError:  # a part that begins in place cannot be recomputed, which matters to those who ask for it
            if checkpoint:
                raise
            lean = plain
    pairs = zip(lean, plain, strict=True)
    return plain, [piece._replace(train=known.train, decoder_flops=known.decoder_flops) for piece, known in pairs]


def _peak(plan: Plan, stages: Sequence[Sequence[Piece]]) -> float:
    return max(phase.peak for phase in predict(plan, sequential(plan), stages))


def _best(plan: Plan, pieces: Sequence[Piece], budget: float, *, peak_first: bool) -> tuple[int, ...]:
    """How many pieces lie up to the end of each stage: by branch and bound, exact.

    The stages are chosen from the bottom. The lowest units alone take no more than they do among all, so what they take
    bounds what can come of a beginning.
    """
    n, overlap = plan.stages, len(plan.units[0].updates) - 1
    if len(pieces) < n:
        raise ValueError(
            f"{n} stages need as many pieces, but the model can only be cut after {[p.end for p in pieces]}"
        )
    best: tuple[float, float, tuple[int, ...]] = (inf, inf, ())

    def extend(ends: tuple[int, ...]) -> None:
        nonlocal best
        if ends:
            stages = [pieces[a:b] for a, b in pairwise((0, *ends))]
            peak = 0.0
            if len(ends) > overlap:
                peak = _peak(Plan.windows(len(ends), overlap), stages)
            most = float(max(sum(piece.flops for piece in stage) for stage in stages))
            first, second = (peak, most) if peak_first else (most, peak)
            if peak > budget or peak == inf or (first, second) >= best[:2]:
                return
            if len(ends) == n:
                best = (first, second, ends)
                return
        left = n - len(ends)
        for end in [len(pieces)] if left == 1 else range((ends or (0,))[-1] + 1, len(pieces) - left + 2):
            extend((*ends, end))

    extend(())
    if not best[2] and budget < inf:
        ends = _best(plan, pieces, inf, peak_first=True)
        least = _peak(plan, [pieces[a:b] for a, b in pairwise((0, *ends))])
        raise ValueError(
            f"no cuts into {n} stages with overlap {overlap} fit into {budget / 1e6:,.0f} MB; the least is "
            f"{least / 1e6:,.0f} MB. Try more stages, less overlap, or checkpoint=True"
        )
    if not best[2]:
        raise ValueError("decoder= fits no outlet at which a unit could end. Give one that does, or channel_axis=")
    return best[2]
