"""docs/works-with.md, of nothing but what works_with.py has found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

TITLES = {
    "torchvision": ("torchvision", "Its families of images, video, segmentation, detection and flow."),
    "timm": ("timm", "The name is that of `timm.create_model`."),
    "transformers": (
        "Hugging Face",
        "Tiny configurations of three or four layers; the names are the configurations' `model_type`. In a deep one, name "
        "every n-th block, or let `stages_of(model, n)` do it.",
    ),
    "own": ("Others", "Small networks from `benchmarks/works`."),
}
ALLOWED = {"float64": 1e-8, "float32": 1e-3}


def text(record: Mapping[str, Any]) -> str:
    return "\n".join(_lines(record)).rstrip() + "\n"


def works(row: Mapping[str, Any]) -> bool:
    return "errors" in row and not row["wrong"] and max(row["errors"].values()) <= ALLOWED.get(row["dtype"], 0)


def refused(row: Mapping[str, Any]) -> bool:
    return "refused" in row


def _lines(record: Mapping[str, Any]) -> Iterator[str]:
    rows = record["rows"]
    right = {name: row for name, row in rows.items() if works(row)}
    no = {name: row for name, row in rows.items() if refused(row)}
    other = {name: row for name, row in rows.items() if name not in right and name not in no}
    outs = [name for name, row in no.items() if any(works(way) for way in row["ways"])]
    recomputed = [name for name, row in right.items() if works(row["checkpoint"])]
    automatic = [name for name, row in rows.items() if "stages" in row.get("auto", {})]
    slowest = max((row["auto"]["seconds"] for row in rows.values() if "stages" in row.get("auto", {})), default=0.0)
    worst = max((max(row["errors"].values()) for row in right.values() if row["dtype"] == "float64"), default=0.0)
    yield "# Works with"
    yield ""
    yield f"Of {len(rows)} networks that were built and tried, **{len(right)} work**: every gradient of `local_step` and of"
    yield f"`loss.backward()` is that of one plain backward per unit, to {worst:.0e} relative at worst in double precision."
    yield f"{len(no)} are refused when they are cut as it says below, with a message; {len(outs)} of these work by a way out that was run,"
    yield f'too. {len(recomputed)} are right with `checkpoint=`, and for {len(automatic)} of all `stages="auto"` finds the cuts, in'
    yield f"{slowest:.0f} seconds of the CPU at most."
    if other:
        yield f"{len(other)} are neither right nor refused, and are listed [at the end](#not-right)."
    yield ""
    yield 'Find your network, and paste what is under "write" into `LocalWrapper(model, ...)`. The errors are the largest relative'
    yield "error of a parameter's gradient, for both ways to train. `checkpoint=True` is tried first; where blocks return several"
    yield 'tensors, the class that is named instead. "auto" is the time that `stages="auto"` takes at that size. Where your network is not'
    yield "listed, or cut elsewhere, [one call](testing.md) tells the same of it."
    yield ""
    yield "Written by `python benchmarks/works_with.py --write docs`: networks with random weights, in training mode, on small inputs."
    for key in ("commit", "versions", "machine"):
        yield f"{key.capitalize()}: {'; '.join(sorted({row[key] for row in rows.values()}))}."
    for kind, (title, about) in TITLES.items():
        shown = {name: row for name, row in right.items() if row["kind"] == kind}
        if shown:
            yield from ["", f"## {title}", "", about, ""]
            yield from _table(shown)
    if no:
        yield from ["", "## Refused, and the way out", ""]
        yield "Weights that several stages use, and activations that cross a cut: cut so, each of these raises an error that says why."
        yield ""
        yield from _refusals(no)
    if other:
        yield from ["", "## Not right", "", "| network | |", "|---|---|"]
        for name, row in other.items():
            yield f"| {name} | {_cell(row.get('failed') or '; '.join(row['wrong']) or 'computed in ' + row['dtype'])} |"
    if missing := record["missing"]:
        yield from ["", "## Not tried yet", "", f"{', '.join(missing)}."]


def _table(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "| network | write | error, `local_step` | error, `backward` | with `checkpoint=` | auto, s |"
    yield "|---|---|--:|--:|---|--:|"
    for name, row in rows.items():
        step, backward = (f"{error:.0e}" for error in row["errors"].values())
        single = "" if row["dtype"] == "float64" else f" ({row['dtype']})"
        yield f"| {_short(name)} | {_write(row)} | {step}{single} | {backward} | {_checkpoint(row['checkpoint'])} | {_auto(row['auto'])} |"


def _refusals(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "| network | cut so | the message | way out | write | error |"
    yield "|---|---|---|---|---|--:|"
    for name, row in rows.items():
        first = [_short(name), _write(row), _cell(row["refused"])]
        for way in row["ways"] or [{"text": "none was tried", "stages": [], "refused": ""}]:
            error = f"{max(way['errors'].values()):.0e}" if works(way) else "refused, too" if way["refused"] else ""
            yield f"| {' | '.join(first)} | {way['text']} | {_write(way)} | {error} |"
            first = ["", "", ""]


def _short(name: str) -> str:
    kind, _, rest = name.partition(" ")
    return rest if kind in ("timm", "transformers") else name


def _write(row: Mapping[str, Any]) -> str:
    return f"`stages=[{', '.join(f'{chr(34)}{name}{chr(34)}' for name in row['stages'])}]`" if row["stages"] else ""


def _checkpoint(found: Mapping[str, Any]) -> str:
    if "errors" not in found:
        return f"refused: {_cell(found['refused'])}"
    policy = "" if found["policy"] == "True" else f", `{found['policy']}`"
    return f"{max(found['errors'].values()):.0e}{policy}" + (
        f" (wrong: {_cell(found['wrong'][0])})" if found["wrong"] else ""
    )


def _auto(found: Mapping[str, Any]) -> str:
    return f"{found['seconds']:.1f}" if "stages" in found else "refused"


def _cell(message: str, most: int = 160) -> str:
    line = " ".join(message.split()).replace("|", "\\|").replace("<", "\\<")
    return line if len(line) <= most else line[:most].rsplit(" ", 1)[0] + " …"
