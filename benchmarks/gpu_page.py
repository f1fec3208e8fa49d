"""docs/benchmarks/on_gpu.md, of nothing but what on_gpu.py has found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import infonce_cuda
from steps import ROWS

NAME = "on_gpu"


def page(found: Path, directory: Path) -> None:
    """Write `on_gpu.json`, all results of the folder `found`, and `on_gpu.md`, which is made of it.

    Of what a piece has printed only the names of failed tests are kept: the rest names files of the machine.
    """
    results = {path.stem: json.loads(path.read_text()) for path in sorted(found.glob("*.json"))}
    for result in results.values():
        if "output" in result:
            result["output"] = [line for line in result["output"] if line.startswith(("FAILED ", "ERROR "))]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{NAME}.json").write_text(json.dumps(results, indent=1) + "\n")
    (directory / f"{NAME}.md").write_text(text(results))


def text(results: dict[str, Any]) -> str:
    return "\n".join(_lines(results)).rstrip() + "\n"


def _lines(results: dict[str, Any]) -> Iterator[str]:
    yield "# On a GPU"
    yield ""
    yield "Written by `python benchmarks/on_gpu.py --page docs/benchmarks` from `on_gpu.json`."
    hardware = sorted({found["hardware"] for found in results.values()})
    commits = sorted({found.get("commit", "unknown") for found in results.values()})
    yield f"Measured on {'; and on '.join(hardware)}; commit {', '.join(commits)}."
    yield ""
    if "tests" in results:
        counts = results["tests"]["counts"]
        yield f"`pytest -m cuda`: {', '.join(f'{count} {what}' for what, count in counts.items())}."
        yield ""
        failed = [
            line.partition(" ")[2] for line in results["tests"]["output"] if line.startswith(("FAILED ", "ERROR "))
        ]
        yield from [f"- `{line}`" for line in failed] + [""] * bool(failed)
    yield from _memory([found for name, found in results.items() if name.startswith("memory-") and "arch" in found])
    rates = results.get("rates", {}).get("flops_per_second", {})
    steps = [found for name, found in results.items() if name.startswith("step-") and "arch" in found]
    if steps:
        yield from _about_steps(rates)
    for found in steps:
        yield from _step(found, rates)
    if "overhead" in results:
        yield from _overhead(results["overhead"])
    if "infonce" in results:
        head, *rows = results["infonce"]["records"]
        yield from (f"#{line}" if line.startswith("#") else line for line in infonce_cuda.page(head, rows))


def _memory(found: list[dict[str, Any]]) -> Iterator[str]:
    if not found:
        return
    yield "## Memory, predicted and measured"
    yield ""
    yield "`memory_report` against `torch.cuda.max_memory_allocated` of a step, both without weights, gradients and images."
    yield ""
    yield "| backbone | views | overlap | recomputed | predicted, MB | measured, MB | off |"
    yield "|---|--:|--:|---|--:|--:|--:|"
    for line in found:
        measured = line["max_memory_allocated_bytes"]
        cells = [line["arch"], f"{line['batch']}", f"{line['overlap']}", "yes" if line["checkpoint"] else "no"]
        cells += [f"{line['predicted_bytes'] / 1e6:,.0f}"]
        cells += ["", ""] if measured is None else [f"{measured / 1e6:,.0f}", f"{100 * line['off']:+.1f} %"]
        yield f"| {' | '.join(cells)} |"
    yield ""


def _about_steps(rates: dict[str, float]) -> Iterator[str]:
    yield "## A step"
    yield ""
    yield 'The median of ten steps of each row in turn. "Graph": the same step captured as one CUDA graph and replayed, without'
    yield 'Python. "Floor": FLOPs over the rate of a large matrix product in the same precision (fp32: TF32, as cuDNN\'s'
    yield "convolutions compute by default)."
    if rates:
        rate = ", ".join(f"{name} {value / 1e12:.0f}" for name, value in rates.items())
        yield f"Measured rates, TFLOP/s: {rate}."
    yield ""


def _step(found: dict[str, Any], rates: dict[str, float]) -> Iterator[str]:
    batch, size = found["images"]
    times, base = found["seconds_per_step"], found["seconds_per_step"]["end-to-end"]
    graphs = found["seconds_per_step"].get("end-to-end, graph")
    yield f"### {found['arch']}, {found['dtype']}, two views of {batch} images of {size} pixels"
    yield ""
    yield "| training | ms | | graph, ms | | GFLOP | | floor, ms | CUDA peak, MB |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    rate = rates.get("tf32" if found["dtype"] == "float32" else found["dtype"])
    for key, flops in found["flops"].items():
        graph = times.get(f"{key}, graph")
        peak = found["cuda_peak_bytes"].get(key)
        cells = [
            ROWS[key].name,
            f"{1e3 * times[key]:.1f}",
            f"{times[key] / base:.2f}x",
            f"{1e3 * graph:.1f}" if graph else "",
            f"{graph / graphs:.2f}x" if graph and graphs else "",
            f"{flops / 1e9:,.0f}",
            f"{flops / found['flops']['end-to-end']:.2f}x",
            f"{1e3 * flops / rate:.1f}" if rate else "",
            f"{peak / 1e6:,.0f}" if peak else "",
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    for key, problem in found["not_captured"].items():
        yield f"{ROWS[key].name} could not be captured: {problem}"
        yield ""


def _overhead(found: dict[str, Any]) -> Iterator[str]:
    yield "## Overhead"
    yield ""
    yield f"A stage of one weight, 64 of them, `overlap=1`: {found['microseconds']:.0f} microseconds in `local_step`,"
    yield f"{found['by_hand']:.0f} for the same calls of autograd by hand, {found['ratio']:.2f}x. In a CUDA graph neither counts."
    yield ""
