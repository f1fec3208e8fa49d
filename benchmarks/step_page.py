"""The page of the step's benchmark: promises, a table and a picture per network, and advice on when to use which."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from networks import NETWORKS
from pareto import Point, draw
from steps import BASE, ROWS

Table = dict[str, Any]

ADVICE = """\
## Which to use

- **As little memory as possible, and the gradient of the whole network:** gradient caching. Its peak is that of one part, so
  that the batch may grow as it likes, and the negatives stay those of the whole batch, which plain accumulation of gradients
  would change. It costs a second forward, and BatchNorm sees the parts one by one: with it, the result is not the same.
- **Less memory, the gradient of the whole network, BatchNorm of the whole batch:** checkpointing, end to end. It costs a
  second forward too. Stages recomputed as a whole keep the least between forward and backward, but the peak lies in the
  backward of the largest one: lower than that of recomputed blocks only where there are many stages that weigh the same.
- **A GPU with a fast link to a large host:** `save_on_cpu` computes nothing twice; whether copies hide behind computation is
  for a measurement on that machine. On a CPU the two are one memory: nothing is saved, and its time says nothing about a GPU.
- **Less memory for hardly any computation:** Greedy InfoMax, at the price of accuracy.
- **No gradient through the whole network:** LoCo, where stages learn without waiting for those above them, as in a pipeline
  over devices, or where local learning is the question itself. As a way to save memory on one device it is not the best:
  without recomputation its peak is above that of every checkpointed rival, and with `checkpoint=True` it is below theirs
  only on networks whose stages weigh about the same (ViT, PResNet-50), for more computation.
- **LoCo in another way than `local_step`:** not for speed. A forward per window computes shared stages twice, and updates
  their BatchNorm statistics twice, for a somewhat lower peak, since no gradient waits at an outlet; the doubled backward
  takes the weights' gradients of shared stages twice.
"""


def title(table: Table) -> str:
    mode = ", compiled" if table["compiled"] else ""
    precision = {"float32": "fp32", "bfloat16": "bf16"}[table["dtype"]]
    return f"{NETWORKS[table['arch']].title}, {precision}{mode}" + (", CUDA" if table["device"] == "cuda" else "")


def picture(table: Table) -> str:
    parts = [
        table["arch"],
        table["dtype"],
        "compiled" * table["compiled"],
        table["device"] * (table["device"] != "cpu"),
    ]
    return f"local_step-{'-'.join(filter(None, parts))}.png"


def text(record: dict[str, Any]) -> str:
    return "\n".join(_lines(record)) + "\n"


def _lines(record: dict[str, Any]) -> Iterator[str]:
    yield "# A training step, local and otherwise"
    yield ""
    yield "Written by `python benchmarks/local_step.py`. Time is the median of steps in turn; FLOPs and bytes are counted under"
    yield 'fake tensors and do not depend on the machine. "Peak" is the most bytes alive at once on the device, without'
    yield 'weights, their gradients and the views; "saved" the most that are kept for a backward, without what is recomputed.'
    yield '"Fits": the largest batch, in images of two views each, for which all of that fits. All rows have the same decoder.'
    yield "Gradient caching keeps the size of its parts when the batch grows."
    yield ""
    yield "## Promises"
    yield ""
    yield "| promise | measured | |"
    yield "|---|---|---|"
    yield from _promises(record)
    yield ""
    yield ADVICE.rstrip()
    for table in record["tables"].values():
        yield from ["", f"## {title(table)}", ""]
        yield from _table(table)
        yield ""
        yield from _better(table)
        if table["times"] and BASE in table["times"]:
            yield ""
            yield f"![Memory over time of every row on {title(table)}]({picture(table)})"
    yield from _overhead(record)


def _table(table: Table) -> Iterator[str]:
    (images, pixels, repeats), (many, large) = table["timed"], table["counted"]
    without = ", eager" if table["compiled"] else ""
    yield f"Counted at two views of {many} images of {large} pixels{without}."
    if table["times"]:
        yield f"Time at {images} images of {pixels} pixels, {repeats} steps of each row;"
        yield f"{table['processes']:.1f} processors computed meanwhile, at a load average of {table['load']:.1f}."
    yield f"`{table['command']}`; {table['machine']}."
    yield ""
    cuda = bool(table["cuda_peak_bytes"])
    eager = table["eager"]
    compared = ["eager, ms", "speed-up"] if eager else []
    columns = [
        "ms",
        "",
        *compared,
        "GFLOP",
        "",
        "peak, MB",
        "less by",
        "saved, MB",
        "less by",
        *(["CUDA peak, MB"] * cuda),
    ]
    yield "| training | " + " | ".join([*columns, f"fits {table['budget']:g} GB"]) + " |"
    yield "|---" * 1 + "|--:" * (len(columns) + 1) + "|"
    base, time = table["counts"].get(BASE), _time(table, BASE)
    for key in ROWS:
        if key not in table["counts"]:
            continue
        row, own = table["counts"][key], _time(table, key)
        cells = [
            f"{1e3 * own:,.0f}" if own else "",
            f"{own / time:.2f}x" if own and time else "",
            *([f"{1e3 * median(eager[key]):,.0f}", f"{median(eager[key]) / own:.2f}x"] if eager else []),
            f"{row['flops'] / 1e9:,.0f}",
            f"{row['flops'] / base['flops']:.2f}x" if base else "",
            *_bytes(row, base, "peak_bytes"),
            *_bytes(row, base, "saved_bytes"),
            *([f"{table['cuda_peak_bytes'][key] / 1e6:,.0f}"] if cuda else []),
            f"{row['fits']:,}",
        ]
        yield f"| {ROWS[key].name} | " + " | ".join(cells) + " |"


def _time(table: Table, key: str) -> float:
    return median(table["times"][key]) if key in table["times"] else 0.0


def _bytes(row: dict[str, int], base: dict[str, int] | None, column: str) -> tuple[str, str]:
    return f"{row[column] / 1e6:,.0f}", f"{base[column] / row[column]:.2f}x" if base and row[column] else ""


def _better(table: Table) -> Iterator[str]:
    """Which rivals are at least as good as LoCo in time and in memory."""
    for ours in ("loco", "loco-checkpoint"):
        if ours not in table["times"]:
            continue
        least, fastest = table["counts"][ours]["peak_bytes"], _time(table, ours)
        keys = [key for key in table["times"] if ROWS[key].rival and _competes(table, key)]
        smaller = {key for key in keys if table["counts"][key]["peak_bytes"] < least}
        faster = {key for key in keys if _time(table, key) < fastest}
        yield f"- Better than {ROWS[ours].name} in peak and time: {_names(smaller & faster)}."
        yield f"  In peak alone: {_names(smaller - faster)}. In time alone: {_names(faster - smaller)}."


def _competes(table: Table, key: str) -> bool:
    """Whether the peak is that of a machine: on a CPU, what is offloaded lies in the same memory."""
    return not ROWS[key].offload or table["device"] == "cuda"


def _names(keys: set[str]) -> str:
    return "; ".join(ROWS[key].name for key in ROWS if key in keys) or "none"


def _promises(record: dict[str, Any]) -> Iterator[str]:
    for table in record["tables"].values():
        if (table["dtype"], table["compiled"]) != ("float32", False):
            continue
        name, counts, times = NETWORKS[table["arch"]].title, table["counts"], table["times"]
        if BASE not in counts:
            continue
        base = counts[BASE]
        if table["arch"] == "resnet50":
            for key, most in (("loco", 1.30), ("gim", 1.10)):
                if key in times:
                    measured = _time(table, key) / _time(table, BASE)
                    where = f" ({table['device']})"
                    yield _promise(
                        f"{name}: {ROWS[key].name} at most {most:.2f}x in time{where}", measured, measured <= most
                    )
            if "loco" in counts:
                measured = counts["loco"]["flops"] / base["flops"]
                yield _promise(f"{name}: {ROWS['loco'].name} at most 1.25x in FLOPs", measured, measured <= 1.25)
            if "naive" in counts:
                measured = counts["naive"]["flops"] / base["flops"]
                yield f"| {name}: a forward per window about 1.5x in FLOPs | {measured:.2f}x | |"
        least = {"resnet50": 3.5, "presnet50": 6.0}.get(table["arch"])
        if least and "loco-checkpoint" in counts:
            measured = base["saved_bytes"] / counts["loco-checkpoint"]["saved_bytes"]
            what = f"{name}: {ROWS['loco-checkpoint'].name} saves at least {least:g}x less"
            yield _promise(what, measured, measured >= least)
        if table["arch"] == "resnet50" and table["own_share"] is not None:
            share = table["own_share"]
            yield f"| {name}: our own lines below 1 % of a step | {share:.2%} | {_verdict(share < 0.01)} |"
    if overhead := record.get("overhead"):
        ratio = overhead["ours"] / overhead["by_hand"]
        yield f"| a stage of one weight at most 1.5x the calls by hand | {ratio:.2f}x | {_verdict(ratio <= 1.5)} |"


def _promise(what: str, measured: float, kept: bool) -> str:
    return f"| {what} | {measured:.2f}x | {_verdict(kept)} |"


def _verdict(kept: bool) -> str:
    return "met" if kept else "**missed**"


def _overhead(record: dict[str, Any]) -> Iterator[str]:
    if overhead := record.get("overhead"):
        yield from ["", "## Our own overhead", ""]
        ratio = overhead["ours"] / overhead["by_hand"]
        yield f"On {overhead['stages']} stages of one weight each, `local_step` with `overlap=1` takes {ratio:.2f} times"
        yield "as long as the same calls of autograd written out by hand:"
        yield f"{overhead['ours']:.0f} and {overhead['by_hand']:.0f} microseconds a stage"
        yield f"({overhead['machine']}, one thread). The share of a ResNet-50 step above is the time that a profile finds in"
        yield "the package's own lines, whatever the batch."


def pictures(record: dict[str, Any], folder: Path) -> None:
    for table in record["tables"].values():
        if BASE not in table["times"]:
            continue
        time, peak = _time(table, BASE), table["counts"][BASE]["peak_bytes"]
        points = [
            Point(
                ROWS[key].name.replace("*", "").replace("`", ""),
                {0: "Greedy InfoMax", None: "SimCLR"}.get(ROWS[key].overlap, "LoCo"),
                _time(table, key) / time,
                table["counts"][key]["peak_bytes"] / peak,
                _competes(table, key),
            )
            for key in table["times"]
        ]
        draw(points, title(table), folder / picture(table))
