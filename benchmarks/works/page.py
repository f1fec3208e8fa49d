"""docs/works-with.md, of nothing but what works_with.py has found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

TITLES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "transformers": "Hugging Face",
    "own": "Others: U-Net, one and three dimensions, recurrent, graphs, points, experts",
}
ABOUT = {
    "torchvision": "Images of 64 pixels, or what the network insists on; short clips.",
    "timm": "The name is that of `timm.create_model`; some are built with fewer or narrower blocks.",
    "transformers": """\
The name is that of `AutoConfig.for_model`, with three or four narrow layers. In a deep one name every n-th layer, or let
`stages_of(model, n, example)` do it. Language models run with `use_cache=False`, wav2vec2 and its kin with `layerdrop=0.0`.""",
    "own": "Small ones, from `benchmarks/works`.",
}
ALLOWED = {"float64": 1e-8, "float32": 1e-3}
Row = Mapping[str, Any]
Rows = Mapping[str, Row]


def text(record: Mapping[str, Any]) -> str:
    return "\n".join(_lines(record["rows"], record["missing"])).rstrip() + "\n"


def works(row: Row) -> bool:
    return "errors" in row and not row["wrong"] and max(row["errors"].values()) <= ALLOWED.get(row["dtype"], 0)


def _lines(rows: Rows, missing: Sequence[str]) -> Iterator[str]:
    right = {name: row for name, row in rows.items() if works(row)}
    no = {name: row for name, row in rows.items() if "refused" in row}
    other = {name: row for name, row in rows.items() if name not in right and name not in no}
    alone = {name: row for name, row in right.items() if "refused" in row["auto"]}
    yield from ["# Works with", ""]
    yield from _summary(rows, right, no, other)
    yield from ["", HOW, ""]
    for key in ("commit", "versions", "machine"):
        yield f"{key.capitalize()}: {'; '.join(sorted({row[key] for row in rows.values()}))}."
    for kind, title in TITLES.items():
        if shown := {name: row for name, row in right.items() if row["kind"] == kind}:
            yield from ["", f"## {title}", "", ABOUT[kind], ""]
            yield from _table(shown)
    if no:
        yield from ["", "## Refused, and the way out", "", REFUSED, ""]
        yield from _refusals(no)
    if alone:
        yield from ["", '## Where `stages="auto"` is refused', ""]
        yield from ["The stages that are named above are the way out, and right.", ""]
        yield from ["| network | the message |", "|---|---|"]
        yield from [f"| {_short(name)} | {_cell(row['auto']['refused'], 400)} |" for name, row in alone.items()]
    if other:
        yield from ["", "## Not right", "", "| network | |", "|---|---|"]
        for name, row in other.items():
            told = row.get("failed") or "; ".join(row["wrong"]) or f"computed in {row['dtype']}"
            yield f"| {_short(name)} | {_cell(told, 400)} |"
    if missing:
        yield from [
            "",
            "## Not tried yet",
            "",
            "The command above goes on where it ended.",
            "",
            f"{', '.join(missing)}.",
        ]


def _summary(rows: Rows, right: Rows, no: Rows, other: Rows) -> Iterator[str]:
    double = [max(row["errors"].values()) for row in right.values() if row["dtype"] == "float64"]
    single = [max(row["errors"].values()) for row in right.values() if row["dtype"] != "float64"]
    seconds = [row["auto"]["seconds"] for row in rows.values() if "stages" in row.get("auto", {})]
    recomputed = sum(works(row["checkpoint"]) for row in right.values())
    outs = sum(any(works(way) for way in row["ways"]) for row in no.values())
    yield f"**{len(right)} of {len(rows)} networks** that were built and tried **work**: each gradient of `local_step` and of"
    yield "`loss.backward()` is that of one plain backward per unit,"
    yield f"to {max(double, default=0):.0e} in double precision at worst."
    if single:
        yield f"{len(single)} of them compute in single precision by themselves, and agree to {max(single):.0e}."
    yield f"With recomputation (`checkpoint=`) {recomputed} are right, too."
    yield f'`stages="auto"` finds cuts for {len(seconds)} of all, in {max(seconds, default=0):.1f} seconds of the CPU at most.'
    if no:
        yield f"{len(no)} are [refused](#refused-and-the-way-out) as they are cut below, with a message;"
        yield f"{outs} of those work by a way out that was run."
    if other:
        yield f"{len(other)} are neither right nor refused, and listed under [not right](#not-right)."


HOW = """\
Find your network, and give `LocalWrapper(model, ...)` what is under "write". An error is the largest relative error of any
parameter's gradient, relative to its norm, or to a millionth of the largest norm where that is more: the larger ones are those of
gradients that are nothing but rounding, as of a bias before BatchNorm. `checkpoint=True` is tried first, and where it is refused
a class of blocks, which is named; errors are those of `local_step`. "Auto" is what `stages="auto"` takes at that size, on a CPU.
Where your network is not listed, or cut elsewhere, [one call](testing.md) tells the same of it.

Written by `python benchmarks/works_with.py --write docs`: networks with random weights, in training mode, on small inputs."""

REFUSED = """\
Weights that several stages use, activations that cross a cut, and blocks that are not one after the other: cut so, each raises
an error that says why."""


def _table(rows: Rows) -> Iterator[str]:
    yield "| network | write | `local_step` | `backward` | with `checkpoint=` | auto, s |"
    yield "|---|---|--:|--:|--:|--:|"
    for name, row in rows.items():
        step, backward = (f"{error:.0e}" for error in row["errors"].values())
        step += "" if row["dtype"] == "float64" else f" ({row['dtype']})"
        cells = [_short(name), _write(row), step, backward, _checkpoint(row["checkpoint"]), _auto(row["auto"])]
        yield f"| {' | '.join(cells)} |"


def _refusals(rows: Rows) -> Iterator[str]:
    yield "| network | cut so | the message | way out | write | error |"
    yield "|---|---|---|---|---|--:|"
    for name, row in rows.items():
        first = [_short(name), _write(row), _cell(row["refused"])]
        for way in row["ways"] or [{"text": "none was tried", "stages": []}]:
            error = f"{max(way['errors'].values()):.0e}" if works(way) else _cell(way.get("refused", ""))
            yield f"| {' | '.join([*first, way['text'], _write(way), error])} |"
            first = ["", "", ""]


def _short(name: str) -> str:
    kind, _, rest = name.partition(" ")
    return rest if kind in ("timm", "transformers") and rest else name


def _write(row: Row) -> str:
    return f"`stages=[{', '.join(f'{chr(34)}{name}{chr(34)}' for name in row['stages'])}]`" if row["stages"] else ""


def _checkpoint(found: Row) -> str:
    if "errors" not in found:
        return f"refused: {_cell(found['refused'])}"
    policy = "" if found["policy"] == "True" else f", `{found['policy']}`"
    return f"{max(found['errors'].values()):.0e}{policy}" + (
        f" (wrong: {_cell(found['wrong'][0])})" if found["wrong"] else ""
    )


def _auto(found: Row) -> str:
    if "refused" in found:
        return "refused"
    few = "" if len(found["stages"]) == 4 else f" ({len(found['stages'])} stages)"
    return f"{found['seconds']:.1f}{few}"


def _cell(message: str, most: int = 160) -> str:
    line = " ".join(message.split()).replace("|", "\\|").replace("<", "\\<")
    return line if len(line) <= most else line[:most].rsplit(" ", 1)[0] + " …"
