"""InfoNCE's rows on one device: single and half precision, up to 65,536 pairs, beside what the products alone would take.

Run by `python benchmarks/infonce.py --device cuda`; one line of JSON per row, written as soon as it is measured. Losses
that are not installed, or whose memory would not fit, are told as such.

The floor of a row is three products over the rate of a large square product in the row's precision, measured first:
every pair of rows once, and once more for each side that it moves. It counts the matrix as kept between forward and
backward; who does not keep it needs four.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hardware import machine
from torch import Tensor
from torch.nn import functional as F

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PAIRS = {"NT-Xent": 2, "one-way": 1, "two-way": 1}  # products of N rows with N that a form needs, symmetry used
LATE = "no time left"
SECONDS = {"cuda": 0.3, "cpu": 0.02}


class Case(NamedTuple):
    """Where a loss is measured: rows of a view, their width, their precision."""

    n: int
    d: int
    dtype: str


class Setting(NamedTuple):
    """What is measured, and where.

    Attributes:
        device: "cuda", or "cpu" to try the script.
        seconds: after which nothing begins.
        memory: MB that a loss may use.
    """

    device: str
    cases: Sequence[Case]
    seconds: float
    memory: float


def cases(device: str, quick: bool) -> list[Case]:
    """In an order of value: the sizes that matter, then the rest."""
    if device == "cpu":
        return [Case(n, 16, dtype) for dtype in DTYPES for n in (32, 64)]
    sizes = [512, 4096, 65536] if quick else [512, 2048, 4096, 16384, 65536]
    return [Case(n, d, dtype) for d in (128, 512) for dtype in DTYPES for n in sizes]


def records(
    every: Sequence[tuple[str, str, Callable[[], Callable[..., Tensor]]]],
    measure: Callable[[Callable[..., Tensor], list[Tensor]], tuple[float, float]],
    setting: Setting,
) -> Iterator[dict[str, Any]]:
    """Measure each loss, (form, name, how it is made), at each case.

    `measure` gives the peak and what is kept, in MB. The first record tells the device and its rates.
    """
    began = time.monotonic()
    rates = {dtype: rate(setting.device, DTYPES[dtype]) for dtype in {case.dtype: 0 for case in setting.cases}}
    yield {"machine": machine(setting.device), "tflops": {dtype: flops / 1e12 for dtype, flops in rates.items()}}
    known: dict[tuple[str, str, str, int], tuple[int, float, float]] = {}
    for case in setting.cases:
        views = embeddings(case, setting.device)
        for form, name, make in every:
            record: dict[str, Any] = {"form": form, "loss": name, **case._asdict()}
            last = known.get((form, name, case.dtype, case.d))
            growth = (case.n / last[0]) ** 2 if last else 0.0
            left = setting.seconds - (time.monotonic() - began)
            if left < 0 or (last and last[1] * growth * 3e-3 > left):
                yield {**record, "skipped": LATE}
                continue
            if last and not name.startswith("locallearn") and last[2] * growth > setting.memory:
                yield {**record, "skipped": f"would take {last[2] * growth / 1e3:.0f} GB"}
                continue
            try:
                loss = make()
                if case.n <= 4096:
                    measure(loss, views)  # first calls import and initialise
                peak, kept = measure(loss, views)
                milliseconds = fastest(loss, views)
            except ImportError as error:
                yield {**record, "skipped": f"not installed ({error.name or error})"}
            except Exception as error:  # noqa: BLE001 - a loss that fails must not keep the others from running
                yield {**record, "skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            else:
                known[form, name, case.dtype, case.d] = case.n, milliseconds, peak
                floor = 1e3 * 3 * 2 * PAIRS[form] * case.n**2 * case.d / rates[case.dtype]
                yield {**record, "ms": milliseconds, "floor_ms": floor, "peak_mb": peak, "kept_mb": kept}
            for view in views:
                view.grad = None
            if setting.device == "cuda":
                torch.cuda.empty_cache()


def rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product, the best of five."""
    n = 8192 if device == "cuda" else 256
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / (1e-3 * min(milliseconds(lambda: a @ a, device) for _ in range(5)))


def milliseconds(run: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def fastest(loss: Callable[..., Tensor], views: list[Tensor]) -> float:
    """Milliseconds of forward and backward, the best of as many as take `SECONDS` together."""

    def step() -> None:
        for view in views:
            view.grad = None
        loss(*views).backward()

    device, times = views[0].device.type, list[float]()
    while sum(times) < 1e3 * SECONDS[device] and len(times) < 100:
        times.append(milliseconds(step, device))
    return min(times)


def embeddings(case: Case, device: str) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(case.n)
    z0, noise = (torch.randn(case.n, case.d, generator=generator, device=device) for _ in range(2))
    return [z.to(DTYPES[case.dtype]).requires_grad_() for z in (z0, z0 + noise)]


def graphed(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Record the loss as a CUDA graph at its first call."""
    recorded: list[Callable[..., Tensor]] = []

    def call(*views: Tensor) -> Tensor:
        if not recorded:
            samples = tuple(view.detach().clone().requires_grad_() for view in views)
            recorded.append(torch.cuda.make_graphed_callables(loss, samples))
        return recorded[0](*views)

    return call


def plain(form: str, temperature: float) -> Callable[..., Tensor]:
    """Compute a form as one would write it down in torch."""

    def loss(z0: Tensor, z1: Tensor) -> Tensor:
        a, b = F.normalize(z0, dim=1), F.normalize(z1, dim=1)
        if form == "NT-Xent":
            z = torch.cat([a, b])
            logits = (z @ z.t() / temperature).fill_diagonal_(-torch.inf)
            return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(a)))
        logits, target = a @ b.t() / temperature, torch.arange(len(a), device=a.device)
        if form == "one-way":
            return F.cross_entropy(logits, target)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2

    return loss


def write(found: Iterator[dict[str, Any]], path: Path | None) -> list[dict[str, Any]]:
    """Write each record as a line of JSON as soon as it is there."""
    every = []
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    for record in found:
        line = json.dumps(record)
        print(line, flush=True)
        if path:
            with path.open("a") as file:
                file.write(line + "\n")
        every.append(record)
    return every


def page(head: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Write the records down in Markdown; what there was no time for is left out."""
    yield from ["# InfoNCE on a GPU", ""]
    yield f"Written by `python benchmarks/infonce.py --device cuda`; forward and backward, temperature 0.1; {head['machine']}."
    rates = ", ".join(f"{rate:.3g} in {dtype}" for dtype, rate in head["tflops"].items())
    yield f"A large product runs at {rates} TFLOP/s; the floor is three products at that rate (four, where the matrix"
    yield "is not kept). In brackets: how many times the floor. What a CUDA graph keeps for itself is not counted."
    tried = [row for row in rows if row.get("skipped") != LATE]
    for dtype, d in dict.fromkeys((row["dtype"], row["d"]) for row in tried):
        here = [row for row in tried if (row["dtype"], row["d"]) == (dtype, d)]
        sizes = list(dict.fromkeys(row["n"] for row in here))
        yield from ["", f"## {dtype}, D = {d}", ""]
        yield "| form | loss | " + " | ".join(f"N = {n}" for n in sizes) + " |"
        yield "|" + "---|" * (len(sizes) + 2)
        for form, name in dict.fromkeys((row["form"], row["loss"]) for row in here):
            cells = {row["n"]: cell(row) for row in here if (row["form"], row["loss"]) == (form, name)}
            yield f"| {form} | {name} | " + " | ".join(cells.get(n, "") for n in sizes) + " |"


def cell(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return str(row["skipped"])
    time = f"{row['ms']:.3g} ms ({row['ms'] / row['floor_ms']:.1f}x)"
    return time if "graph" in row["loss"] else f"{time}, {row['peak_mb']:.3g} MB"
