"""What benchmarks/scale.py writes: the page, and pictures of who computes and who waits."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from replay import INSTANT, UNIT, Costs, Link, Op, Span, alone, end_to_end, local, most_kept, run, seconds_per_batch

from locallearn import Plan

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from drawing.figure_style import STYLE, quiet

CEILING = "ceiling: each process by itself, half of the steps"
KINDS = {"forward": "#4477aa", "decoder": "#ccbb44", "pull": "#66ccee", "push": "#228833"}
RANKS = (2, 4, 8, 16, 32, 64)
CLASSICAL = ("GPipe", "1F1B", "ZB-H1")
BATCHES = 24
PAPER = {  # per cent of the FLOPs in each stage, by Table 6 of the LoCo paper
    "PResNet-50, six": (13.50, 14.63, 14.77, 16.62, 20.45, 20.04),
    "ResNet-50, four": (19.39, 25.09, 35.80, 19.73),
}


SUMMARY = {  # how rows of a chain begin, and what docs/scaling.md calls them
    "LoCo, exact": "LoCo, exact",
    "LoCo, eager": "LoCo, eager",
    "Greedy InfoMax, pipeline": "Greedy InfoMax",
    "end to end, GPipe": "end to end, GPipe of `torch.distributed.pipelining`, the better of 4 and 8 micro-batches",
    "end to end, 1F1B": "end to end, its 1F1B, the same",
    "end to end, DistributedDataParallel": "end to end, DistributedDataParallel",
}
COLUMNS = ["ms a batch", "quartiles", "speed-up", "of the ceiling", "by replay", "peak MB, by rank", "MB sent, by rank"]
HEAD = """# Two processes

`{command}`; {machine}.

Chains of blocks in four stages, two on each process; momentum SGD; single precision. Ways take turns, {steps} steps at a time,
after which pipelines run empty; medians over {rounds} rounds, and quartiles. Peaks are of live bytes, without weights and their
gradients. Two processes that send each other nothing and share the steps tell what two cores of this machine can do: the
*ceiling*. The speed-up of each row is over one process of its own method, and given as a share of the ceiling, too. The
replay's is from costs of single stages, at the size of a micro-batch where there are such, and the ceiling. torch's pipelines
have a micro-batch's own negatives, all others the whole batch's; in data parallel each process has half of it.
"""
CHAIN = """
## {width} channels of {pixels} x {pixels}

{blocks} blocks, {rows} images a batch, both views together. The ceiling is {ceiling:.2f} times one process.
"""
MANY = """## More ranks, by replay

Speed-up over one process of the same method, if every stage costs the same: forward 1, input gradient 1, gradients of
weights with the way through 2, decoder 0.5, and messages nothing. GPipe, 1F1B and ZB-H1 end to end, with 32 micro-batches and
a flush after each batch.
"""
LATE = """
With an outlet, or its gradient, that takes as long to send as half of a stage's forward:

"""
KEPT = """
What the busiest rank keeps of the activations of a whole batch, in % of what one process keeps end to end. The parts of a batch
that are on their way to it, and gradients that wait, come on top.

"""
PAPERS = """
## The paper's own case, by replay

One stage on each rank, by its share of the FLOPs in Table 6; LoCo with early sends, and eager.
"""
NETWORKS = """
## Real backbones, by replay

Cut by `plan_stages(ranks=)`, two stages a rank, from measured seconds of every stage; messages take nothing, the classical
schedules have 32 micro-batches. {machine}.
"""


def speedups(record: dict[str, Any]) -> dict[str, float]:
    """Over one process of the same method, row by row; the median of the ratios within a round."""
    rows = record["rows"]
    found = {}
    for name, row in rows.items():
        one = rows[f"{row['method']}, one process"]["seconds"]
        found[name] = median(a / b for a, b in zip(one, row["seconds"], strict=True))
    return found


def predicted(record: dict[str, Any]) -> dict[str, float]:
    """By the replay of the costs measured on one thread, times what two processes at once get of two cores."""
    by_parts = {int(parts): [Costs(**cost) for cost in costs] for parts, costs in record["costs"].items()}
    costs = by_parts.pop(1)
    ceiling = speedups(record)[CEILING] / 2
    found = {}
    for name, overlap, eager in (("LoCo, exact", 1, False), ("LoCo, eager", 1, True), ("Greedy InfoMax", 0, False)):
        plan = Plan.windows(len(costs), overlap)
        found[f"{name}, pipeline [2, 2]"] = _local(plan, [2, 2], costs, eager=eager)[0] * ceiling
    one = _end_to_end_seconds(costs)
    for name in ("GPipe", "1F1B"):
        for parts, smaller in by_parts.items():
            spans = run(end_to_end([2, 2], _one_decoder(smaller), BATCHES, parts, name))
            found[f"end to end, {name}, {parts} micro-batches"] = one / seconds_per_batch(spans) * ceiling
    return found


def _one_decoder(costs: Sequence[Costs]) -> list[Costs]:
    return [*(cost._replace(decoder=0) for cost in costs[:-1]), costs[-1]]


def _end_to_end_seconds(costs: Sequence[Costs]) -> float:
    return sum(cost.forward + cost.push for cost in costs) + costs[-1].decoder


def summary(record: dict[str, Any]) -> str:
    """The table of docs/scaling.md: of each way the speed-up, and of torch's pipelines the better number of micro-batches."""
    chains = record["chains"]
    headers = [
        f"{c['setting']['width']} channels of {c['setting']['pixels']} x {c['setting']['pixels']}" for c in chains
    ]
    lines = [f"| | {' | of the ceiling | '.join(headers)} | of the ceiling |", "|---|" + "--:|--:|" * len(chains)]
    for way, name in SUMMARY.items():
        cells = []
        for chain in chains:
            fast = speedups(chain)
            best = max(speed for row, speed in fast.items() if row.startswith(way))
            cells += [f"{best:.2f}", f"{best / fast[CEILING]:.0%}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def text(record: dict[str, Any]) -> str:
    return "\n".join(_lines(record)) + "\n"


def _lines(record: dict[str, Any]) -> Iterator[str]:
    first = record["chains"][0]
    yield HEAD.format(
        rounds=len(first["rows"][CEILING]["seconds"]),
        steps=first["steps"],
        command=record["command"],
        machine=record["machine"],
    )
    for chain in record["chains"]:
        yield from _chain(chain)
    yield "\n![Who computes and who waits, on four ranks](scale_timeline.png)\n"
    yield from _many()
    yield from _networks(record)


def _chain(record: dict[str, Any]) -> Iterator[str]:
    fast, expected = speedups(record), predicted(record)
    ceiling = fast[CEILING]
    yield CHAIN.format(**record["setting"], ceiling=ceiling)
    yield f"| | {' | '.join(COLUMNS)} |"
    yield "|---|" + "--:|" * len(COLUMNS)
    for name, row in record["rows"].items():
        seconds = sorted(row["seconds"])
        low, high = seconds[len(seconds) // 4], seconds[-1 - len(seconds) // 4]
        replayed = f"{expected[name]:.2f}" if name in expected else ""
        peaks, sent = (" / ".join(f"{n / 1e6:.1f}" for n in row[column] if n) for column in ("peak_bytes", "sent"))
        yield (
            f"| {name} | {1e3 * median(seconds):.0f} | {1e3 * low:.0f} to {1e3 * high:.0f} | {fast[name]:.2f} | "
            f"{fast[name] / ceiling:.0%} | {replayed} | {peaks} | {sent} |"
        )
    yield ""
    yield from _promises(fast, expected, ceiling)


def _promises(fast: dict[str, float], expected: dict[str, float], ceiling: float) -> Iterator[str]:
    exact = fast["LoCo, exact, pipeline [2, 2]"]
    classical = {name: value for name, value in fast.items() if "micro-batches" in name}
    best = max(classical, key=classical.__getitem__)
    off = {name: value / fast[name] - 1 for name, value in expected.items()}
    worst = max(off, key=lambda name: abs(off[name]))
    yield f"- LoCo exact reaches {exact / ceiling:.0%} of the ceiling (wanted: 95 %): {_verdict(exact >= 0.95 * ceiling)}."
    ratio = exact / classical[best]
    verdict = _verdict(ratio >= 1.2)
    yield f"- Its speed-up is {ratio:.2f} times that of the best of torch's pipelines, {best} (wanted: 1.2): {verdict}."
    yield f"- The replay is off by {off[worst]:+.0%} at most, for {worst} (wanted: 10 %): {_verdict(abs(off[worst]) <= 0.1)}."


def _verdict(kept: bool) -> str:
    return "kept" if kept else "**missed**"


def _many() -> Iterator[str]:
    yield MANY
    exact = [f"LoCo exact, {each} a rank" for each in (1, 2, 4)]
    header = " | ".join(["Greedy InfoMax", *exact, "LoCo eager, 1 a rank", *CLASSICAL])
    rule = "|--:|" + "--:|" * (5 + len(CLASSICAL))
    for most, link, heading in ((len(RANKS), INSTANT, ""), (4, Link(0.0, 0.5), LATE)):
        yield f"{heading}| ranks | {header} |"
        yield rule
        for ranks in RANKS[:most]:
            yield f"| {ranks} | " + " | ".join(f"{fast:.2f}" for fast, _ in replayed(ranks, link)) + " |"
    yield f"{KEPT}| ranks | {header} |"
    yield rule
    for ranks in RANKS:
        yield f"| {ranks} | " + " | ".join(f"{100 * kept:.1f}" for _, kept in replayed(ranks)) + " |"
    yield PAPERS
    yield "| backbone and workers | LoCo exact | LoCo eager | Greedy InfoMax |"
    yield "|---|--:|--:|--:|"
    for name, shares in PAPER.items():
        costs = [Costs(*(share * part for part in UNIT)) for share in shares]
        loco, gim, each = Plan.windows(len(costs), 1), Plan.greedy(len(costs)), [1] * len(costs)
        cells = _speedup(loco, each, costs), _speedup(loco, each, costs, eager=True), _speedup(gim, each, costs)
        yield f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |"


def _networks(record: dict[str, Any]) -> Iterator[str]:
    if "networks" not in record:
        return
    yield NETWORKS.format(machine=record["network_machine"])
    yield "| backbone | ranks | LoCo exact | LoCo eager | Greedy InfoMax | GPipe | 1F1B | ZB-H1 |"
    yield "|---|" + "--:|" * 7
    for name, by_ranks in record["networks"].items():
        for ranks, costs in by_ranks.items():
            cells = " | ".join(f"{value:.2f}" for value in _network([Costs(**cost) for cost in costs], int(ranks)))
            yield f"| {name} | {ranks} | {cells} |"


def _network(costs: Sequence[Costs], ranks: int) -> list[float]:
    each = [2] * ranks
    loco, gim = Plan.windows(len(costs), 1), Plan.greedy(len(costs))
    found = [_speedup(loco, each, costs), _speedup(loco, each, costs, eager=True), _speedup(gim, each, costs)]
    return found + [_classical(each, costs, schedule)[0] for schedule in CLASSICAL]


def _speedup(plan: Plan, ranks: Sequence[int], costs: Sequence[Costs], *, eager: bool = False) -> float:
    return _local(plan, ranks, costs, eager=eager)[0]


def _local(
    plan: Plan, ranks: Sequence[int], costs: Sequence[Costs], link: Link = INSTANT, *, eager: bool = False
) -> tuple[float, float]:
    """The speed-up over one process, and what the busiest rank keeps as a part of the whole network's activations."""
    spans = run(local(plan, ranks, costs, BATCHES, eager=eager), link)
    return alone(plan, costs) / seconds_per_batch(spans), most_kept(spans) / plan.stages


def _classical(
    ranks: Sequence[int], costs: Sequence[Costs], schedule: str, link: Link = INSTANT
) -> tuple[float, float]:
    """The same of end-to-end training with 32 micro-batches."""
    spans = run(end_to_end(ranks, _one_decoder(costs), 6, 32, schedule), link)
    return _end_to_end_seconds(costs) / seconds_per_batch(spans), most_kept(spans) / len(costs)


def replayed(ranks: int, link: Link = INSTANT) -> list[tuple[float, float]]:
    """Speed-ups and what is kept, in the order of the page's columns."""
    found = [_local(Plan.greedy(ranks), [1] * ranks, [UNIT] * ranks, link)]
    for each in (1, 2, 4):
        found.append(_local(Plan.windows(ranks * each, 1), [each] * ranks, [UNIT] * (ranks * each), link))
    found.append(_local(Plan.windows(ranks, 1), [1] * ranks, [UNIT] * ranks, link, eager=True))
    costs = [UNIT._replace(decoder=0)] * ranks
    return found + [_classical([1] * ranks, costs, schedule, link) for schedule in CLASSICAL]


def pictures(record: dict[str, Any], folder: Path) -> None:
    loco, greedy = Plan.windows(8, 1), Plan.greedy(8)
    programs: dict[str, list[list[Op]]] = {
        "LoCo exact, two stages a rank": local(loco, [2] * 4, [UNIT] * 8, 8),
        "LoCo eager, one stage a rank": local(Plan.windows(4, 1), [1] * 4, [UNIT] * 4, 8, eager=True),
        "Greedy InfoMax, two stages a rank": local(greedy, [2] * 4, [UNIT] * 8, 8),
        "GPipe, 4 micro-batches": end_to_end([2] * 4, [UNIT] * 8, 8, 4, "GPipe"),
        "1F1B, 4 micro-batches": end_to_end([2] * 4, [UNIT] * 8, 8, 4, "1F1B"),
        "ZB-H1, 4 micro-batches": end_to_end([2] * 4, [UNIT] * 8, 8, 4, "ZB-H1"),
    }
    timeline({name: run(program) for name, program in programs.items()}, folder / "scale_timeline.png")


def timeline(found: dict[str, Sequence[Span]], path: Path) -> None:
    """One panel for each schedule, on one axis of time: a bar for each operation, a rank in each row; white is waiting."""
    shown = 0.75 * min(max(span.end for span in spans) for spans in found.values())
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 1.5 * len(found)), layout="constrained", facecolor="white")
        panels = figure.subplots(len(found), 1, squeeze=False, sharex=True)[:, 0]
        for panel, (name, spans) in zip(panels, found.items(), strict=True):
            for kind, colour in KINDS.items():
                bars = [span for span in spans if span.kind == kind]
                panel.barh(
                    [span.rank for span in bars],
                    [span.end - span.begin for span in bars],
                    left=[span.begin for span in bars],
                    color=colour,
                    edgecolor="white",
                    linewidth=0.4,
                    label=kind,
                )
            panel.set(title=name, ylabel="rank", xlim=(0, shown))
            panel.invert_yaxis()
            panel.set_yticks(sorted({span.rank for span in spans}))
            quiet(panel, "x")
        figure.legend(*panels[0].get_legend_handles_labels(), ncols=len(KINDS), loc="outside upper right", fontsize=8)
        panels[-1].set_xlabel("time, in forwards of a stage")
        figure.savefig(path, format="png", dpi=130)
