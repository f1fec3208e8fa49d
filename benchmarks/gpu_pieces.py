"""What on_gpu.py measures, piece by piece: each takes a device and gives what was found, with whether it `holds`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from overhead import per_stage
from steps import ROWS, Setting, Step, Steps, cuda_peak, interleaved, synchronize
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from locallearn import ConvMLPDecoder, LocalWrapper, TokenDecoder, memory_report

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 0.1  # of what is predicted of memory
RATIO = 1.5  # promised at most: a stage's time in `local_step`, by that of the same calls by hand
SLOWER = {"loco": 1.30, "gim": 1.10}  # promised at most, by end-to-end's time

Found = dict[str, Any]


# ------------------------------------------------------------------------------------------------------ right or wrong


def tests(device: str) -> Found:
    """The tests that need the device; where there is none, they are all skipped, which holds."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    if device == "cuda" and importlib.util.find_spec("xdist"):
        command += [
            "-n",
            str(min(12, os.cpu_count() or 1)),
            "-p",
            "no:benchmark",
        ]  # pytest-benchmark warns beside xdist
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", ended.stdout)}
    ran = counts.get("passed", 0) > 0 if device == "cuda" else counts.get("skipped", 0) + counts.get("passed", 0) > 0
    return {"counts": counts, "output": ended.stdout.splitlines()[-40:], "holds": ended.returncode == 0 and ran}


class Network(NamedTuple):
    build: Callable[[], nn.Module]
    stages: list[str]
    decoder: Callable[[int], nn.Module]


LAYERS = ["layer1", "layer2", "layer3", "layer4"]
BLOCKS = [f"encoder.layers.encoder_layer_{k}" for k in (2, 5, 8, 11)]
NETWORKS = {
    "resnet50": Network(models.resnet50, LAYERS, ConvMLPDecoder),
    "vit_s16": Network(partial(models.VisionTransformer, 224, 16, 12, 6, 384, 1536), BLOCKS, TokenDecoder),
    "tiny": Network(
        lambda: nn.Sequential(*(nn.Conv2d(8 if k else 3, 8, 3, padding=1) for k in range(4))),
        list("0123"),
        ConvMLPDecoder,
    ),
}


def memory(arch: str, batch: int, size: int, overlap: int, checkpoint: bool, device: str) -> Found:
    """The peak of a step, and what was predicted of it, both without weights, their gradients and the images."""
    network = NETWORKS[arch]
    torch.manual_seed(0)
    views = torch.rand(2 * batch, 3, size, size, device=device).chunk(2)
    example = views[0][:2]
    model = LocalWrapper(
        network.build().to(device), network.stages, overlap, network.decoder, checkpoint=checkpoint, example=example
    )
    predicted = max(memory_report(model, *views).predicted)
    model.local_step(*views)  # gradients, and what libraries keep for themselves, are there from now on
    counted = cuda_peak(lambda: model.local_step(*views)) if device == "cuda" else None
    off = None if counted is None else predicted / counted - 1
    return {
        "arch": arch,
        "batch": 2 * batch,
        "overlap": overlap,
        "checkpoint": checkpoint,
        "predicted_bytes": predicted,
        "max_memory_allocated_bytes": counted,
        "off": off,
        "holds": off is None or abs(off) <= TOLERANCE,
    }


# ------------------------------------------------------------------------------------------------------ fast or slow


def rates(device: str) -> Found:
    """FLOPs per second of large matrix products: what nothing here can be faster than. Random numbers; zeros are quicker."""
    size = 8192 if device == "cuda" else 256
    found: dict[str, float] = {}
    for name, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bfloat16", torch.bfloat16, True),
    ):
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        known, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, tf32
        try:
            seconds = interleaved({name: lambda a=a, b=b: a @ b}, 10, iter)[name]
        finally:
            torch.backends.cuda.matmul.allow_tf32 = known
        found[name] = 2 * size**3 / min(seconds)
    return {"flops_per_second": found, "holds": True}


def overhead(device: str) -> Found:
    """What a stage of one weight takes in `local_step` beside the same calls of autograd by hand."""
    ours, by_hand = per_stage(device=device)
    ratio = ours / by_hand
    return {"microseconds": ours, "by_hand": by_hand, "ratio": ratio, "holds": ratio <= RATIO or device == "cpu"}


def step(arch: str, dtype: str, batch: int, size: int, device: str) -> Found:
    """Steps of each row in turn, launched by Python and replayed as a CUDA graph; FLOPs, and memory."""
    torch.manual_seed(0)
    rows = ["end-to-end", "blocks", "gim", "gim-checkpoint", "naive", "paper", "loco", "loco-checkpoint", "overlap-2"]
    rows, repeats = (rows, 10) if device == "cuda" else (["end-to-end", "gim", "loco"], 1)
    setting = Setting(arch, batch, size, getattr(torch, dtype))
    steps = Steps(setting, setting.network.make(size).to(device), setting.images(device))
    chosen = {key: steps.step(ROWS[key]) for key in rows}
    flops = {}
    for key, run in chosen.items():
        with FlopCounterMode(display=False) as counter:
            run()
        flops[key] = counter.get_total_flops()
    peaks = {key: cuda_peak(run) for key, run in chosen.items()} if device == "cuda" else {}
    graphs: dict[str, Step] = {}
    refused: dict[str, str] = {}
    for key in ("end-to-end", "gim", "loco") if device == "cuda" else ():
        try:
            graphs[f"{key}, graph"] = captured(chosen[key])
        except RuntimeError as problem:
            refused[key] = str(problem).splitlines()[0]
            synchronize()
    times = {key: median(seconds) for key, seconds in interleaved(chosen | graphs, repeats, iter).items()}
    ratios = {key: times[key] / times["end-to-end"] for key in times}
    return {
        "arch": arch,
        "dtype": dtype,
        "images": [batch, size],
        "seconds_per_step": times,
        "ratios": ratios,
        "flops": flops,
        "cuda_peak_bytes": peaks,
        "not_captured": refused,
        "holds": device == "cpu" or all(ratios[key] <= most for key, most in SLOWER.items()),
    }


def captured(run: Step) -> Step:
    """A step as one CUDA graph. Gradients are there, so that each replay adds to them, as each step does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def infonce(device: str, budget: float | None) -> Found:
    """infonce.py's rows for the device: the short form where time is limited."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "infonce.jsonl"
        command = [sys.executable, "benchmarks/infonce.py", "--device", device, "--json", str(lines)]
        command += ["--quick", "--budget", f"{min(budget, 75):.0f}"] if budget is not None else []
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        records = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    holds = ended.returncode == 0 and len(records) > 1
    return {"records": records, "output": ended.stderr.splitlines()[-40:], "holds": holds}


# -------------------------------------------------------------------------------------------------------- does it learn


def training(*options: str, out: Path, jobs: int, device: str, budget: float | None) -> Found:
    """overlap_curve.py for as long as there is time; what is unfinished goes on in a later call."""
    command = [sys.executable, "examples/overlap_curve.py", *options, "--out", str(out), "--jobs", str(jobs)]
    with shared_card(device) as environment, (out.parent / f"{out.name}.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        try:
            status = process.wait(timeout=budget)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it saves what runs, and stops
            status = process.wait()
    results = out / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    told = [{key: line[key] for key in ("curve", "row", "seed", "accuracy", "seconds")} for line in lines]
    return {"command": command[1:], "runs": told, "unfinished": status != 0, "holds": status in (0, 130)}


@contextmanager
def shared_card(device: str) -> Iterator[dict[str, str]]:
    """The environment for processes that share the card: by NVIDIA's MPS where it is there, else in turns."""
    control = shutil.which("nvidia-cuda-mps-control")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if device != "cuda" or control is None or "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        yield environment
        return
    with tempfile.TemporaryDirectory() as folder:
        environment |= {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        subprocess.run([control, "-d"], env=environment, check=False)
        try:
            yield environment
        finally:
            subprocess.run([control], input="quit\n", text=True, env=environment, check=False)
            time.sleep(1)


# ------------------------------------------------------------------------------------------------------------ all


class Piece(NamedTuple):
    """Something that is measured.

    Attributes:
        name: of its file.
        seconds: how long it is expected to take on a GPU; of what can go on in a later call, how long is worth a start.
        run: gives what was found, with `holds`; may be `unfinished`.
        limited: whether it is told how many seconds are left.
    """

    name: str
    seconds: float
    run: Callable[..., Found]
    limited: bool = False


def pieces(args: argparse.Namespace) -> Iterator[Piece]:
    """In an order of value."""
    tiny = args.device == "cpu"
    yield Piece("tests", 60, tests)
    cases = [("tiny", 2, 16)] if tiny else [("resnet50", 32, 224), ("vit_s16", 32, 224)]
    for arch, batch, size in cases:
        for overlap, checkpoint in ((1, False), (0, False), (1, True), (3, False)):
            name = f"memory-{arch}-overlap{overlap}{'-recomputed' * checkpoint}"
            yield Piece(name, 10, partial(memory, arch, batch, size, overlap, checkpoint))
    yield Piece("rates", 5, rates)
    yield Piece("overhead", 5, overhead)
    every = [("resnet50", "float32"), ("resnet50", "bfloat16"), ("vit_s", "bfloat16"), ("vit_s", "float32")]
    for arch, dtype in [("shufflenet_v2_50", "float32")] if tiny else every:
        batch, size = (2, 65) if tiny else (64, 224)
        yield Piece(f"step-{arch}-{dtype}", 15, partial(step, arch, dtype, batch, size))
    yield Piece("infonce", 30, infonce, limited=True)
    train = partial(Piece, seconds=60, limited=True)
    noted = ("--commit", args.commit) if args.commit else ()
    common: dict[str, Any] = {"out": args.out / "curves", "jobs": args.jobs}
    if args.data is not None:
        data = ("--data", args.data, "--data-dir", str(args.data_dir), *noted)
        few = ("--images", "256", "--held-out", "64", "--epochs", "1", "--seeds", "0") if tiny else ()
        less = ("--curves", "contrastive-6-short", "--rows", "0") if tiny else ()
        yield train("curves-short", run=partial(training, "--preset", "gpu-short", *data, *few, *less, **common))
        if not tiny:
            whole = ("--preset", "gpu", "--curves", "simclr-8", "--rows", "0", "1", "7", "--seeds", "0")
            yield train("curves-resnet18", run=partial(training, *whole, *data, **common))
    if args.imagenette is not None:
        data = ("--data", "imagenette", "--data-dir", str(args.imagenette), *noted)
        yield train("curves-imagenette", run=partial(training, "--preset", "imagenette", *data, **common))
