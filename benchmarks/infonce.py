"""Time, memory and accuracy of InfoNCE against other libraries' losses.

    python benchmarks/infonce.py                            # everything, the others in a throw-away environment
    python benchmarks/infonce.py --sizes 512 2048 --threads 1 --repeats 3
    python benchmarks/infonce.py --write docs/benchmarks/infonce.md

Times are of forward and backward together, the best of interleaved repetitions; memory is the peak of live bytes beyond
the inputs, counted at the allocator, and what is kept between forward and backward. A loss whose memory, extrapolated
from the smaller sizes, would not fit is not run, and its row says so.

On a GPU, with what is installed there (`--quick` takes a minute; without, more sizes, torch.compile and CUDA graphs):

    python benchmarks/infonce.py --device cuda --quick --budget 60 --json infonce.jsonl --write infonce-cuda.md
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import infonce_cuda
import torch
from hardware import commit, processor, versions
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
PEERS = ["lightly", "pytorch-metric-learning", "info-nce-pytorch", "open_clip_torch"]
TEMPERATURE = 0.1
PROBE = 128
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Row:
    """One loss, with its measurements by number of pairs."""

    name: str
    form: str
    make: Callable[[], Loss]
    growth: int = 2  # memory grows with this power of N
    peer: bool = True  # or torch's own operator, for comparison
    milliseconds: dict[int, float] = field(default_factory=dict)
    peak: dict[int, float] = field(default_factory=dict)  # MB
    kept: dict[int, float] = field(default_factory=dict)  # MB
    remark: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, kept: dict[str, Any]) -> Row:
        """A row of a record, whose keys JSON has made text; it has nothing to run."""
        numbers = {
            name: {int(n): v for n, v in value.items()} for name, value in kept.items() if isinstance(value, dict)
        }
        return cls(**{**kept, **numbers}, make=lambda: torch.dot)


def ours(**options: object) -> Callable[[], Loss]:
    from locallearn import InfoNCE

    return lambda: InfoNCE(TEMPERATURE, **options)


def ours_with_top1(**options: object) -> Callable[[], Loss]:
    from locallearn import InfoNCE

    return lambda: lambda *views: InfoNCE(TEMPERATURE, **options)(*views, return_top1=True)[0]


def ours_with_labels() -> Loss:
    from locallearn import info_nce

    return lambda z0, z1: info_nce(z0, z1, temperature=TEMPERATURE, labels=classes(z0))


def classes(z: Tensor) -> Tensor:
    return torch.arange(z.shape[0], device=z.device) // 4


def lightly() -> Loss:
    return importlib.import_module("lightly.loss").NTXentLoss(TEMPERATURE)


def metric_learning(loss: str) -> Loss:
    losses = importlib.import_module("pytorch_metric_learning.losses")
    return losses.SelfSupervisedLoss(getattr(losses, loss)(temperature=TEMPERATURE), symmetric=True)


def metric_learning_with_labels() -> Loss:
    losses = importlib.import_module("pytorch_metric_learning.losses")
    loss = losses.SupConLoss(temperature=TEMPERATURE)
    return lambda z0, z1: loss(torch.cat([z0, z1]), classes(z0).repeat(2))


def solo_learn() -> Loss:
    """Compute solo-learn's published formula; the package pins a torch of 2021 and does not install."""

    def loss(z0: Tensor, z1: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z0, z1]), dim=-1)
        similarity = torch.exp(torch.einsum("if, jf -> ij", z, z) / TEMPERATURE)
        index = torch.arange(z0.shape[0], device=z.device).repeat(2).unsqueeze(0)
        positive = (index.t() == index).fill_diagonal_(0)
        negative = (index.t() != index).float()
        attracting = (similarity * positive).sum(1)
        return -torch.mean(torch.log(attracting / (attracting + (similarity * negative).sum(1))))

    return loss


def plain() -> Loss:
    """Compute NT-Xent in five lines of torch."""

    def loss(z0: Tensor, z1: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z0, z1]), dim=1)
        logits = (z @ z.t() / TEMPERATURE).fill_diagonal_(-math.inf)
        return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z0)))

    return loss


def info_nce_pytorch() -> Loss:
    return importlib.import_module("info_nce").InfoNCE(TEMPERATURE)


def linear_cross_entropy() -> Loss:
    """Compute the one-way form by torch's own chunked operator."""
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(z0: Tensor, z1: Tensor) -> Tensor:
        query, key = F.normalize(z0, dim=1) / TEMPERATURE, F.normalize(z1, dim=1)
        return F.linear_cross_entropy(query, key, torch.arange(len(z0), device=z0.device), options=options)

    return loss


def open_clip() -> Loss:
    loss = importlib.import_module("open_clip").ClipLoss()
    return lambda z0, z1: loss(F.normalize(z0, dim=1), F.normalize(z1, dim=1), logit_scale=1 / TEMPERATURE)


def rows() -> list[Row]:
    every = [
        Row("locallearn", "NT-Xent", ours()),
        Row("lightly NTXentLoss", "NT-Xent", lightly),
        Row("pytorch-metric-learning SupConLoss", "NT-Xent", lambda: metric_learning("SupConLoss")),
        Row("pytorch-metric-learning NTXentLoss", "NT-Xent", lambda: metric_learning("NTXentLoss"), growth=3),
        Row("solo-learn (its formula)", "NT-Xent", solo_learn),
        Row("plain torch", "NT-Xent", plain),
        Row("locallearn", "one-way", ours(form="one-way")),
        Row("info-nce-pytorch", "one-way", info_nce_pytorch),
        Row("locallearn", "two-way", ours(form="two-way")),
        Row("open_clip ClipLoss", "two-way", open_clip),
        Row("locallearn", "SupCon, labels", ours_with_labels),
        Row("pytorch-metric-learning SupConLoss", "SupCon, labels", metric_learning_with_labels),
    ]
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        every.insert(8, Row("torch linear_cross_entropy", "one-way", linear_cross_entropy, peer=False))
    return every


def embeddings(n: int, device: str, d: int = 128) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(n, d, generator=generator).to(device).requires_grad_() for _ in range(2)]


def step(loss: Loss, views: list[Tensor]) -> float:
    """Return the milliseconds of one forward and backward."""
    for view in views:
        view.grad = None
    synchronize(views[0])
    start = time.perf_counter()
    loss(*views).backward()
    synchronize(views[0])
    return 1e3 * (time.perf_counter() - start)


def synchronize(z: Tensor) -> None:
    if z.is_cuda:
        torch.cuda.synchronize()


def memory(loss: Loss, views: list[Tensor]) -> tuple[float, float]:
    """Return the peak of one forward and backward, and what is alive between the two, in MB beyond the inputs."""
    for view in views:
        view.grad = None
    if views[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value = loss(*views)
        between = torch.cuda.memory_allocated() - before
        value.backward()
        return (torch.cuda.max_memory_allocated() - before) / 1e6, between / 1e6
    with Quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as forward:
        value = loss(*views)
    with Quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as backward:
        value.backward()
    peak, between = live_bytes(forward, 0)
    return max(peak, live_bytes(backward, between)[0]) / 1e6, between / 1e6


def live_bytes(recorded: profile, live: int) -> tuple[int, int]:
    peak = live
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak, live


class Quiet:
    """Silence the profiler's own messages, which go to the process's stderr."""

    def __enter__(self) -> None:
        self.saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)

    def __exit__(self, *_: object) -> None:
        os.dup2(self.saved, 2)
        os.close(self.saved)


def measure(every: list[Row], sizes: list[int], repeats: int, patience: float, limit: float, device: str) -> None:
    """Fill in the rows, size by size."""
    for row in every:
        if row.growth > 2:  # the smallest size may be too large already
            row.peak[PROBE], row.milliseconds[PROBE] = memory(row.make(), embeddings(PROBE, device))[0], 0.0
    for n in sizes:
        views, ready = embeddings(n, device), []
        values: dict[str, float] = {}
        for row in every:
            if reason := too_much(row, n, patience, limit):
                row.remark[n] = reason
                continue
            loss = row.make()
            step(loss, embeddings(64, device))  # first calls import and initialise
            row.peak[n], row.kept[n] = memory(loss, views)
            value = loss(*views).item()
            expected = values.setdefault(row.form, value)
            if not math.isclose(value, expected, rel_tol=1e-5):
                row.remark[n] = f"its value is {value:.6f} and ours {expected:.6f}"
            ready.append((row, loss))
        for repeat in range(repeats * max(1, 2048 // n)):
            for row, loss in ready:
                if repeat > 1 and row.milliseconds[n] * repeats > 1e3 * patience:
                    continue  # slow ones are timed twice
                if n <= 1024:
                    step(loss, views)  # what ran before has emptied the caches, for small ones a matter of weight
                row.milliseconds[n] = min(step(loss, views), row.milliseconds.get(n, math.inf))
        print(f"N = {n} done", file=sys.stderr)


def too_much(row: Row, n: int, patience: float, limit: float) -> str:
    """Say why a loss is not run at this size, if the smaller ones tell."""
    if not row.peak:
        return ""
    last = max(row.peak)
    predicted = row.peak[last] * (n / last) ** row.growth
    if row.name != "locallearn" and predicted > limit:
        return f"predicted {predicted / 1e3:,.0f} GB: does not fit"
    if row.milliseconds[last] * (n / last) ** row.growth > 1e3 * patience * 8:
        return f"predicted {row.milliseconds[last] * (n / last) ** row.growth / 1e3:.3g} s: not run"
    return ""


def table(every: list[Row], sizes: list[int]) -> Iterator[str]:
    """Write one line per loss: milliseconds and megabytes, and how many times ours."""
    yield "| form | loss | " + " | ".join(f"N = {n}: ms, MB" for n in sizes) + f" | kept, N = {sizes[-1]} |"
    yield "|" + "---|" * (len(sizes) + 3)
    for row in every:
        reference = next(other for other in every if other.form == row.form)
        cells = []
        for n in sizes:
            if n not in row.milliseconds:
                cells.append(row.remark[n])
                continue
            cell = f"{row.milliseconds[n]:.3g} ms, {row.peak[n]:.3g} MB"
            if row is not reference:
                time_ratio, memory_ratio = ratios(row, reference, n)
                cell += f" ({time_ratio:.1f}x, {memory_ratio:.1f}x)"
            cells.append(cell + (f"; {row.remark[n]}" if n in row.remark else ""))
        kept = [f"{row.kept[n]:.3g} MB" if n in row.kept else "" for n in sizes[-1:]]
        yield "| " + " | ".join([row.form, f"**{row.name}**" if row is reference else row.name, *cells, *kept]) + " |"


def ratios(row: Row, reference: Row, n: int) -> tuple[float, float]:
    return row.milliseconds[n] / reference.milliseconds[n], row.peak[n] / reference.peak[n]


TARGETS = [  # form, peer, N, times faster, times less memory
    ("NT-Xent", "lightly NTXentLoss", 4096, 8, 50),
    ("NT-Xent", "plain torch", 4096, 4, 1),
    ("one-way", "info-nce-pytorch", 4096, 2, 12),
    ("two-way", "open_clip ClipLoss", 4096, 3, 15),
]


def targets(every: list[Row], sizes: list[int]) -> Iterator[str]:
    """Say which of the promises hold in this run."""
    yield "| promise | measured | |"
    yield "|---|---|---|"
    found = {(row.form, row.name): row for row in every}
    for form, peer, n, faster, smaller in TARGETS:
        row = found[form, peer]
        if n in row.milliseconds:
            time_ratio, memory_ratio = ratios(row, found[form, "locallearn"], n)
            verdict = "met" if time_ratio >= faster and memory_ratio >= smaller else "**missed**"
            yield (
                f"| N = {n}, {form}: {faster}x faster than {peer}, 1/{smaller} of its memory "
                f"| {time_ratio:.1f}x, 1/{memory_ratio:.0f} | {verdict} |"
            )
    for n in sizes:
        worse = []
        for row in every:
            if n in row.milliseconds and row.name != "locallearn" and row.peer:
                time_ratio, memory_ratio = ratios(row, found[row.form, "locallearn"], n)
                if min(time_ratio, memory_ratio) < 1:
                    worse.append(f"{row.name} ({row.form}): {time_ratio:.2f}x time, {memory_ratio:.2f}x memory")
        verdict = "**missed**" if worse else "met"
        yield f"| N = {n}: at least as good as every peer | {'; '.join(worse) or 'yes'} | {verdict} |"
    if 16384 in sizes:
        peak = found["NT-Xent", "locallearn"].peak[16384]
        yield f"| N = 16384 in less than 100 MB | {peak:.1f} MB | {'met' if peak < 100 else '**missed**'} |"


def reference(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """Compute NT-Xent in float64 without cancellation: softplus(logsumexp of the negatives - positive)."""
    z = F.normalize(torch.cat([z0, z1]), dim=1)
    logits, rows = z @ z.t() / temperature, torch.arange(len(z))
    positive = logits[rows, rows.roll(len(z0))]
    negatives = logits.clone()
    negatives[rows, rows] = negatives[rows, rows.roll(len(z0))] = -math.inf
    return F.softplus(negatives.logsumexp(1) - positive, threshold=700).mean()


def accuracy(every: list[Row]) -> Iterator[str]:
    """Write relative errors of single-precision NT-Xent gradients, N = 48, D = 128."""
    cases = [
        (temperature, pairs, autocast)
        for temperature in (0.1, 0.02)
        for pairs in ("random", "related", "aligned")
        for autocast in (False, True)
    ]
    noise = {"random": 100, "related": 1, "aligned": 0.1}  # z1 = z0 + noise: cosines of 0, 0.7 and 0.995
    yield "| temperature | pairs | autocast | " + " | ".join(row.name for row in every) + " |"
    yield "|" + "---|" * (len(every) + 3)
    for temperature, pairs, autocast in cases:
        global TEMPERATURE  # noqa: PLW0603  # the rows are functions of two views only
        before, TEMPERATURE = TEMPERATURE, temperature
        z0, z1 = (z.detach() for z in embeddings(48, "cpu"))
        views = [z0.requires_grad_(), (z0.detach() + noise[pairs] * z1).requires_grad_()]
        doubles = [view.detach().double().requires_grad_() for view in views]
        exact = torch.cat(torch.autograd.grad(reference(*doubles, temperature), doubles))
        cells = []
        for row in every:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = row.make()(*views)
            found = torch.cat(torch.autograd.grad(loss, views)).double()
            cells.append(f"{float((found - exact).norm() / exact.norm()):.1e}")
        TEMPERATURE = before
        yield "| " + " | ".join([str(temperature), pairs, "bf16" if autocast else "", *cells]) + " |"


def precisions() -> Iterator[str]:
    """Write relative errors of the gradient of half-precision inputs, N = 256, D = 128, against float64 of the same."""
    yield '| input | temperature | pairs | `precision="single"` | `"input"` | plain torch | rounding of the result |'
    yield "|" + "---|" * 7
    for dtype, temperature, noise in itertools.product(
        (torch.bfloat16, torch.float16), (0.1, 0.02), {"random": 100, "related": 1, "aligned": 0.1}.items()
    ):
        z0, z1 = (z.detach() for z in embeddings(256, "cpu"))
        views = [z.to(dtype).requires_grad_() for z in (z0, z0 + noise[1] * z1)]
        doubles = [view.detach().double().requires_grad_() for view in views]
        exact = torch.cat(torch.autograd.grad(reference(*doubles, temperature), doubles))
        from locallearn import info_nce

        losses = [
            *(partial(info_nce, temperature=temperature, precision=p) for p in ("single", "input")),
            infonce_cuda.plain("NT-Xent", temperature),
        ]
        found = [torch.cat(torch.autograd.grad(loss(*views), views)).double() for loss in losses]
        errors = [float((g - exact).norm() / exact.norm()) for g in (*found, exact.to(dtype).double())]
        name = str(dtype).removeprefix("torch.")
        yield f"| {name} | {temperature} | {noise[0]} | " + " | ".join(f"{error:.1e}" for error in errors) + " |"


def half_precision(record: dict[str, Any]) -> str:
    """What `precisions` wrote, for docs/infonce.md."""
    return "\n".join(record["precisions"]) + "\n"


def equalities() -> Iterator[str]:
    """Write relative differences of value and gradient from the other libraries' losses, in float64, N = 48."""
    yield "| form | loss | value | gradient |"
    yield "|---|---|---|---|"
    views = [z.detach().double().requires_grad_() for z in embeddings(48, "cpu")]
    every = rows()
    for row in every:
        if row.name == "locallearn":
            continue
        mine = next(other for other in every if other.form == row.form).make()(*views)
        theirs = row.make()(*views)
        wanted, found = (torch.cat(torch.autograd.grad(loss, views)) for loss in (mine, theirs))
        value, gradient = float((theirs - mine).abs() / mine), float((found - wanted).norm() / wanted.norm())
        yield f"| {row.form} | {row.name} | {value:.0e} | {gradient:.0e} |"


def top1_cost(sizes: list[int], repeats: int) -> Iterator[str]:
    """Write how much longer a step takes that also tells top-1, ratios of the best of interleaved repetitions."""
    yield "| form | " + " | ".join(f"N = {n}" for n in sizes) + " |"
    yield "|" + "---|" * (len(sizes) + 1)
    for form in infonce_cuda.PAIRS:
        settings = {} if form == "NT-Xent" else {"form": form}
        losses, cells = (ours(**settings)(), ours_with_top1(**settings)()), []
        for n in sizes:
            views, best = embeddings(n, "cpu"), [math.inf, math.inf]
            for _ in range(repeats * max(1, 2048 // n)):
                best = [min(so_far, step(loss, views)) for so_far, loss in zip(best, losses, strict=True)]
            cells.append(f"{best[1] / best[0]:.2f}x")
        yield f"| {form} | " + " | ".join(cells) + " |"


def import_milliseconds() -> float:
    """Return what `from locallearn import InfoNCE` costs beyond `import torch`, the best of five processes."""
    code = "import time, torch; t = time.perf_counter(); from locallearn import InfoNCE; print(time.perf_counter() - t)"
    runs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout)
        for _ in range(5)
    ]
    return 1e3 * min(runs)


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that was asked for."""
    found: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/infonce.py", *(a for a in sys.argv[1:] if a != "--installed")]),
        "machine": f"{processor()}, {versions('torch', *PEERS)}",
        "commit": commit(),
        "sizes": arguments.sizes,
        "threads": [],
    }
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        every = rows()
        measure(every, arguments.sizes, arguments.repeats, arguments.patience, 1e3 * arguments.memory, "cpu")
        kept = [{name: value for name, value in vars(row).items() if name != "make"} for row in every]
        found["threads"].append({"threads": threads, "load": os.getloadavg()[0], "cores": os.cpu_count(), "rows": kept})
    found["accuracy"] = [*accuracy([row for row in rows() if row.form == "NT-Xent" and row.growth == 2])]
    found["precisions"] = [*precisions()]
    found["equalities"] = [*equalities()]
    found["top1"] = [*top1_cost([n for n in arguments.sizes if n <= 4096], arguments.repeats)]
    found["import_ms"] = import_milliseconds()
    return found


def page(record: dict[str, Any]) -> str:
    return "\n".join(_lines(record)) + "\n"


def _lines(record: dict[str, Any]) -> Iterator[str]:
    yield "# InfoNCE against other libraries"
    yield ""
    yield f"`{record['command']}`; forward and backward, D = 128, single precision, temperature 0.1; {record['machine']}."
    yield "In brackets: how many times our time and memory. NT-Xent and SupCon compare 2N rows, the others N with N."
    for run in record["threads"]:
        threads = f"{run['threads']} thread{'s' * (run['threads'] > 1)}"
        every = [Row.of(row) for row in run["rows"]]
        yield from ["", f"## CPU, {threads} ({run['load']:.1f} processes computing on {run['cores']} cores)", ""]
        yield from table(every, record["sizes"])
        yield from ["", f"Promises, {threads}:", "", *targets(every, record["sizes"])]
    yield from ["", "## Accuracy", "", "Relative error of the gradient, against float64 without cancellation;"]
    yield from ["promised: at most 3e-6 at temperature 0.1, 3e-5 at 0.02.", "", *record["accuracy"], ""]
    yield "Half precision in: relative error of the gradient, against float64 of the same rounded inputs."
    yield from ["", *record["precisions"], "", "## Equalities", ""]
    yield from [
        "Relative differences between ours and theirs in float64:",
        "",
        *record["equalities"],
        "",
        "## Top-1",
        "",
    ]
    yield f"A step that also tells top-1, of one that does not; {record['threads'][-1]['threads']} thread(s):"
    yield from ["", *record["top1"], "", "## Import", ""]
    yield f"{record['import_ms']:.1f} ms beyond `import torch` (promised: 50)."


def on_device(arguments: argparse.Namespace) -> None:
    """Measure the rows that a GPU is for, as JSON, and write their page."""
    device = arguments.device
    every = [(row.form, row.name, row.make) for row in rows() if row.form in infonce_cuda.PAIRS and row.growth == 2]
    every = [(form, name, make) for form, name, make in every if not name.startswith(("solo", "plain", "pytorch-"))]
    for number, form in enumerate(infonce_cuda.PAIRS):
        plainly = partial(infonce_cuda.plain, form, TEMPERATURE)
        settings = {} if form == "NT-Xent" else {"form": form}
        every += [(form, "plain torch", plainly)]
        every += [(form, "locallearn, with top-1", ours_with_top1(**settings))]
        every += [(form, "locallearn, precision=input", ours(**settings, precision="input"))]
        mine = ours(**settings)
        if not arguments.quick:
            every += [(form, "locallearn, compiled", lambda make=mine: torch.compile(make()))]
            every += [(form, "plain torch, compiled", lambda make=plainly: torch.compile(make()))]
        if device == "cuda" and (number == 0 or not arguments.quick):
            every += [(form, "locallearn, CUDA graph", lambda make=mine: infonce_cuda.graphed(make()))]
    every.sort(key=lambda row: list(infonce_cuda.PAIRS).index(row[0]))
    memory_limit = 0.8 * torch.cuda.mem_get_info()[0] / 1e6 if device == "cuda" else 1e3 * arguments.memory
    cases = infonce_cuda.cases(device, arguments.quick)
    setting = infonce_cuda.Setting(device, cases, arguments.budget, memory_limit)
    head, *found = infonce_cuda.write(infonce_cuda.records(every, memory, setting), arguments.json)
    if arguments.write:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.write_text("\n".join(infonce_cuda.page(head, found)) + "\n")


def in_throw_away_environment() -> int:
    """Run this file again where the other libraries are installed, beside what is installed here."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        here = sysconfig.get_path("purelib")
        site = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        (Path(site) / "host.pth").write_text(f"{here}\n{ROOT}\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS], check=True)
        return subprocess.run([python, __file__, "--installed", *sys.argv[1:]], check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 2048, 4096, 16384], help="numbers of pairs")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--patience", type=float, default=20, help="seconds that one loss may take at one size")
    parser.add_argument("--memory", type=float, default=10, help="GB that one loss may use")
    parser.add_argument("--write", type=Path, help="file for the report; beside it goes what it is made of, .json")
    parser.add_argument("--installed", action="store_true", help="the other libraries are here already")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="the GPU's rows instead; cpu tries them at a tiny size"
    )
    parser.add_argument("--quick", action="store_true", help="with --device: fewer sizes, nothing compiled")
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="with --device: seconds after which no row begins"
    )
    parser.add_argument(
        "--json", type=Path, help="with --device: file for the rows, one line of JSON each, as they come"
    )
    arguments = parser.parse_args()
    if arguments.device:
        on_device(arguments)
        return
    if not arguments.installed:
        sys.exit(in_throw_away_environment())
    record = measured(arguments)
    print(page(record))
    if arguments.write:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        arguments.write.write_text(page(record))


if __name__ == "__main__":
    main()
