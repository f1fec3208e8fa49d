"""Schedules of pipelines, replayed without running them: who computes when, who waits, and how fast it goes.

Every rank carries out its operations one after the other, in the order in which the schedule has them; an operation begins
when the rank is free and the messages that it needs are there. Costs are those of stages: measured, or in units of a forward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from locallearn import Plan
from locallearn.pipeline.share import Share, shares


class Costs(NamedTuple):
    """Seconds that a stage takes, by what is done with it.

    Attributes:
        forward: of a whole batch.
        pull: its input gradient alone.
        push: its weights' gradients, for which the gradient passes through it once.
        decoder: forward and backward of the decoder and the loss at its outlet.
    """

    forward: float
    pull: float
    push: float
    decoder: float


UNIT = Costs(1, 1, 2, 0.5)


class Link(NamedTuple):
    """Between neighbours.

    Attributes:
        latency: seconds from the end of an operation until its message is there, whatever its size.
        per_outlet: seconds more for an outlet of a whole batch, or its gradient.
    """

    latency: float = 0.0
    per_outlet: float = 0.0


INSTANT = Link()


@dataclass
class Op:
    """What a rank does at a stretch; messages are named as the sender and the receiver agree.

    Attributes:
        kind: "forward", "decoder", "pull" or "push" as in :class:`Costs`, or "wait".
        batch: its number.
        seconds: that it takes.
        needs: the messages that it waits for.
        gives: messages, and the part of an outlet that each is.
        keeps: how many stages' activations of a whole batch live on from here; negative if they end here.
        later: what it leaves to be done while the rank would wait.
        most_owed: how many of those may still be undone when it begins.
    """

    kind: str
    batch: int
    seconds: float
    needs: tuple[object, ...] = ()
    gives: list[tuple[object, float]] = field(default_factory=list)
    keeps: float = 0.0
    later: Op | None = None
    most_owed: float = float("inf")


class Span(NamedTuple):
    """When an operation ran, and what it kept."""

    rank: int
    kind: str
    batch: int
    begin: float
    end: float
    keeps: float


def run(programs: Sequence[Iterable[Op]], link: Link = INSTANT) -> list[Span]:
    """All operations, with their times.

    Raises:
        ValueError: if ranks wait for each other for ever.
    """
    left = [deque(program) for program in programs]
    owed: list[deque[Op]] = [deque() for _ in left]
    free = [0.0] * len(left)
    arrived: dict[object, float] = {}
    spans: list[Span] = []

    def do(rank: int, op: Op, ready: float = 0.0) -> None:
        begin = max(free[rank], ready)
        free[rank] = begin + op.seconds
        spans.append(Span(rank, op.kind, op.batch, begin, free[rank], op.keeps))
        for message, part in op.gives:
            arrived[message] = free[rank] + link.latency + part * link.per_outlet
        if op.later is not None:
            owed[rank].append(op.later)

    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(left):
            while program and all(need in arrived for need in program[0].needs):
                op = program.popleft()
                ready = max((arrived[need] for need in op.needs), default=0.0)
                while (debts := owed[rank]) and (len(debts) > op.most_owed or free[rank] + debts[0].seconds <= ready):
                    do(rank, debts.popleft())
                do(rank, op, ready)
                moved = True
    if any(left):
        raise ValueError(f"ranks wait for each other: {[program[0] for program in left if program]}")
    for rank, debts in enumerate(owed):
        for op in debts:
            do(rank, op)
    return spans


def local(
    plan: Plan, ranks: Sequence[int], costs: Sequence[Costs], batches: int, *, eager: bool = False
) -> list[list[Op]]:
    """A pipeline of local units, in the order of :class:`locallearn.pipeline.Pipeline`."""
    return [[*_local_rank(plan, share, costs, batches, eager)] for share in shares(plan, ranks)]


def _local_rank(plan: Plan, share: Share, costs: Sequence[Costs], batches: int, eager: bool) -> Iterator[Op]:
    for t in range(batches):
        waiting: set[int] = set()  # stages with a gradient at their outlet that waits for others

        def walk(k: int, t: int, waiting: set[int] = waiting) -> Iterator[Op]:
            unit = plan.units[k]
            for stage in range(min(unit.last, share.highest), max(unit.lowest, share.lowest) - 1, -1):
                last, below = share.last_uses[stage] == k, stage > unit.lowest
                leaving = below and stage == share.lowest
                sent: list[tuple[object, float]] = [(("gradient", k, share.rank - 1, t), 1.0)] if leaving else []
                if last and stage not in waiting and (eager or not leaving):
                    yield Op("push", t, costs[stage].push, gives=sent, keeps=-1)
                    continue
                if stage in unit.updates:
                    waiting.add(stage)
                if below:
                    yield Op("pull", t, costs[stage].pull, gives=sent)
                if last and stage in waiting:
                    yield Op("push", t, costs[stage].push, keeps=-1)

        below = (("outlet", share.rank - 1, t),) if share.rank else ()
        for stage in share.stages:
            op = Op("forward", t, costs[stage].forward, below if stage == share.lowest else (), keeps=1)
            if stage == share.highest:
                op.gives.append((("outlet", share.rank, t), 1.0))
            yield op
            for k in share.units:
                if plan.units[k].last == stage:
                    yield Op("decoder", t, costs[stage].decoder)
                    yield from walk(k, t)
        for k in share.from_above:
            late = t - 1 if eager else t
            if late >= 0:
                yield Op("wait", late, 0.0, (("gradient", k, share.rank, late),))
                if eager:
                    yield Op("push", late, costs[share.highest].push, keeps=-1)
                else:
                    yield from walk(k, late)


def end_to_end(ranks: Sequence[int], costs: Sequence[Costs], batches: int, parts: int, schedule: str) -> list[list[Op]]:
    """GPipe, 1F1B or ZB-H1 with ``parts`` micro-batches; the loss is at the last stage, and every batch ends in a flush.

    ZB-H1 (Qi et al., 2024, "Zero Bubble Pipeline Parallelism") computes weights' gradients while it would wait, and keeps no
    more on any rank than 1F1B does on the first.
    """
    begins = [sum(ranks[:r]) for r in range(len(ranks))]
    programs: list[list[Op]] = []
    for rank, (begin, n) in enumerate(zip(begins, ranks, strict=True)):
        own = costs[begin : begin + n]
        top = rank == len(ranks) - 1
        forward = sum(c.forward for c in own) / parts
        pull = (sum(c.pull for c in own) + (own[-1].decoder if top else 0)) / parts
        push = (sum(c.push - c.pull for c in own)) / parts
        program: list[Op] = []
        for t in range(batches):
            program += _one_batch(rank, len(ranks), t, parts, schedule, (forward, pull, push), n / parts)
        programs.append(program)
    return programs


def _one_batch(
    rank: int, ranks: int, t: int, parts: int, schedule: str, seconds: tuple[float, float, float], kept: float
) -> list[Op]:
    forward, pull, push = seconds

    def f(m: int) -> Op:
        below = ((("f", rank - 1, t, m),)) if rank else ()
        owed = rank if m else 0  # ranks further up have less to wait for, and may put more off; a step comes first
        return Op("forward", t, forward, below, [(("f", rank, t, m), 1 / parts)], kept, most_owed=owed)

    def b(m: int) -> Op:
        above = (("b", rank + 1, t, m),) if rank < ranks - 1 else ()
        gives: list[tuple[object, float]] = [(("b", rank, t, m), 1 / parts)]
        if schedule == "ZB-H1":
            return Op("pull", t, pull, above, gives, later=Op("push", t, push, keeps=-kept))
        return Op("push", t, pull + push, above, gives, keeps=-kept)

    if schedule == "GPipe":
        return [*map(f, range(parts)), *map(b, range(parts))]
    ahead = min(ranks - rank, parts)  # forwards before the first backward
    program = [f(m) for m in range(ahead)]
    for m in range(parts):
        program.append(b(m))
        if m + ahead < parts:
            program.append(f(m + ahead))
    return program


def most_kept(spans: Sequence[Span]) -> float:
    """The most that a rank keeps at once, in activations of a stage for a whole batch."""
    kept: dict[int, float] = {}
    most = 0.0
    for span in spans:  # a rank's own are in the order of time
        kept[span.rank] = kept.get(span.rank, 0.0) + span.keeps
        most = max(most, kept[span.rank])
    return most


def seconds_per_batch(spans: Sequence[Span]) -> float:
    """In the steady state: between the ends of a batch a third of the way and of the last but one."""
    batches = max(span.batch for span in spans)
    ends = [max(span.end for span in spans if span.batch <= t) for t in range(batches)]
    first = batches // 3
    return (ends[-1] - ends[first]) / (len(ends) - 1 - first)


def alone(plan: Plan, costs: Sequence[Costs]) -> float:
    """Seconds that one process takes for a batch."""
    return seconds_per_batch(run(local(plan, [plan.stages], costs, 6)))
