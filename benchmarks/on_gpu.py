"""Everything that only a GPU can tell, in pieces that take minutes: stop it anywhere, and go on in a later call.

    python benchmarks/on_gpu.py --out gpu --budget 9m
    python benchmarks/on_gpu.py --out gpu --budget 9m --resume

Pieces run in an order of value. Each writes its result at once, as ``<out>/<piece>.json``: what it found, on what, how long it
took, and whether it holds. ``--resume`` leaves out those that have one. No piece begins that is not expected to end within
``--budget``. ``--device cpu`` runs the same at a tiny size, which says nothing but that the script works.

tests     ``pytest -m cuda``: gradients against autograd's own, mixed precision, recomputation, compiled blocks, losses
memory-*  the peak of a step by ``torch.cuda.max_memory_allocated`` beside what ``memory_report`` predicts: within a tenth

Exit status: 0 if all pieces hold that have run, 1 if one does not.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hardware import machine
from torch import Tensor, nn
from torchvision import models

from locallearn import ConvMLPDecoder, LocalWrapper, TokenDecoder, memory_report

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 0.1


class Piece(NamedTuple):
    """Something that is measured.

    Attributes:
        name: of its file.
        seconds: how long it is expected to take on a GPU.
        run: gives what was found, with ``holds``.
    """

    name: str
    seconds: float
    run: Callable[[str], dict[str, Any]]


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


def cuda_tests(device: str) -> dict[str, Any]:
    """The tests that need the device; where there is none, they are all skipped, which holds."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", ended.stdout)}
    ran = counts.get("passed", 0) > 0 if device == "cuda" else counts.get("skipped", 0) + counts.get("passed", 0) > 0
    return {"counts": counts, "output": ended.stdout.splitlines()[-40:], "holds": ended.returncode == 0 and ran}


def memory(arch: str, batch: int, size: int, overlap: int, checkpoint: bool, device: str) -> dict[str, Any]:
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
    counted = _cuda_peak(model, views) if device == "cuda" else None
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


def _cuda_peak(model: LocalWrapper, views: tuple[Tensor, ...]) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model.local_step(*views)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def pieces(device: str) -> Iterator[Piece]:
    """In an order of value."""
    yield Piece("tests", 240, cuda_tests)
    cases = [("tiny", 2, 16)] if device == "cpu" else [("resnet50", 32, 224), ("vit_s16", 32, 224)]
    for arch, batch, size in cases:
        for overlap, checkpoint in ((1, False), (0, False), (1, True), (3, False)):
            name = f"memory-{arch}-overlap{overlap}{'-recomputed' * checkpoint}"
            yield Piece(name, 40, partial(memory, arch, batch, size, overlap, checkpoint))


def seconds(text: str) -> float:
    """``90``, ``90s``, ``9m`` or ``1h``.

    >>> seconds("90"), seconds("9m"), seconds("1.5h")
    (90.0, 540.0, 5400.0)
    """
    if (match := re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)) is None:
        raise argparse.ArgumentTypeError(f"a time such as 90s, 9m or 1h; got {text!r}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("on_gpu"), help="folder for the results (%(default)s)")
    add("--budget", type=seconds, default=float("inf"), help="the time this call may take, such as 9m (no limit)")
    add("--resume", action="store_true", help="leave out the pieces that have a result")
    add("--device", choices=("cpu", "cuda"), default="cuda", help="(%(default)s)")
    add("--only", default="", help="the pieces whose name begins so")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu tries the script at a tiny size")
    arguments.out.mkdir(parents=True, exist_ok=True)
    began, holds = time.monotonic(), True
    for piece in pieces(arguments.device):
        if not piece.name.startswith(arguments.only):
            continue
        path = arguments.out / f"{piece.name}.json"
        if arguments.resume and path.exists():
            found = json.loads(path.read_text())
            print(f"{piece.name}: {_told(found)}, known")
        elif time.monotonic() - began + piece.seconds > arguments.budget:
            print(f"{piece.name}: left for a later call with --resume")
            continue
        else:
            found = _run(piece, arguments.device)
            _write(path, found)
            print(f"{piece.name}: {_told(found)}, {found['seconds']:.0f} s", flush=True)
        holds = holds and found["holds"]
    return 0 if holds else 1


def _run(piece: Piece, device: str) -> dict[str, Any]:
    began = time.monotonic()
    try:
        found = piece.run(device)
    except Exception as error:  # noqa: BLE001 - one piece that fails must not keep the others from running
        found = {"error": f"{type(error).__name__}: {error}", "holds": False}
    if device == "cuda":
        torch.cuda.empty_cache()
    return {**found, "device": device, "hardware": machine(device), "seconds": time.monotonic() - began}


def _write(path: Path, found: dict[str, Any]) -> None:
    """Whole or not at all: whoever stops the script half-way finds no half of a result."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(found, indent=1) + "\n")
    unfinished.replace(path)


def _told(found: dict[str, Any]) -> str:
    return "holds" if found["holds"] else f"DOES NOT HOLD ({found.get('error') or found.get('off') or 'see its file'})"


if __name__ == "__main__":
    sys.exit(main())
