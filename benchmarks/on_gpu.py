"""Everything that only a GPU can tell, in pieces that take minutes: stop it anywhere, and go on in a later call.

    python benchmarks/on_gpu.py --out gpu --budget 9m --data data/cifar10.npz --imagenette data
    python benchmarks/on_gpu.py --out gpu --budget 9m --data data/cifar10.npz --resume
    python benchmarks/on_gpu.py --out gpu --page docs/benchmarks      # measures nothing: the page of what there is

Pieces run in an order of value. Each writes its result at once, as `<out>/<piece>.json`: what it found, on what, how long it
took, and whether it holds. `--resume` leaves out those that have one. No piece begins that is not expected to end within
`--budget`; trainings stop there, and go on in a later call. `--device cpu` runs the same at a tiny size, which says nothing
but that the script works.

tests      `pytest -m cuda`: gradients against autograd's own, mixed precision, recomputation, compiled blocks, losses
memory-*   the peak of a step by `torch.cuda.max_memory_allocated` beside what `memory_report` predicts: within a tenth
rates      FLOPs per second of large matrix products, the floor of what follows
overhead   a stage of one weight in `local_step`, beside the same calls of autograd by hand
step-*     a step of each of local_step.py's rows, launched by Python and as one CUDA graph
infonce    infonce.py's rows
curves-*   overlap_curve.py: `--preset gpu-short` and ResNet-18's SimCLR, with `--data`; Imagenette, with `--imagenette`

Needs torch, torchvision, einops and typing-extensions, and for the trainings scikit-learn, rich, tqdm and matplotlib.
Exit status: 0 if all pieces hold that have run, 1 if one does not.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path

import torch
from gpu_page import page
from gpu_pieces import Found, Piece, pieces
from hardware import commit, machine


def seconds(text: str) -> float:
    """`90`, `90s`, `9m` or `1h`.

    >>> seconds("90"), seconds("9m"), seconds("1.5h")
    (90.0, 540.0, 5400.0)
    """
    if (match := re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)) is None:
        raise argparse.ArgumentTypeError(f"a time such as 90s, 9m or 1h; got {text!r}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--out", type=Path, default=Path("on_gpu"), help="folder for the results (%(default)s)")
    add("--budget", type=seconds, default=float("inf"), help="the time this call may take, such as 9m (no limit)")
    add("--resume", action="store_true", help="leave out the pieces that have a result")
    add("--device", choices=("cpu", "cuda"), default="cuda", help="(%(default)s)")
    add("--only", default="", help="the pieces whose name begins so")
    add("--data", help="CIFAR-10 for the trainings: a path to an .npz, or cifar10; without it they are left out")
    add("--data-dir", type=Path, default=Path("data"), help="where torchvision's files are (%(default)s)")
    add("--imagenette", type=Path, help="the folder that holds imagenette2-160, likewise")
    add("--commit", help="to be noted in the results, where this script lies outside of its repository")
    add("--jobs", type=int, default=14, help="trainings at a time (%(default)s)")
    add(
        "--page",
        type=Path,
        metavar="DIR",
        help="measure nothing; write on_gpu.md and on_gpu.json of what --out has there",
    )
    return result


def main() -> int:
    arguments = parser()
    args = arguments.parse_args()
    if args.page:
        page(args.out, args.page)
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        arguments.error("there is no CUDA device here; --device cpu tries the script at a tiny size")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    began, holds = time.monotonic(), True
    for piece in pieces(args):
        if not piece.name.startswith(args.only):
            continue
        path = args.out / f"{piece.name}.json"
        left = args.budget - (time.monotonic() - began)
        known = json.loads(path.read_text()) if args.resume and path.exists() else {"error": "unknown"}
        if "error" not in known:
            found = known
            print(f"{piece.name}: {told(found)}, known")
        elif piece.seconds > left:
            print(f"{piece.name}: left for a later call with --resume")
            continue
        else:
            found = measured(piece, args, left)
            if not found.get("unfinished"):
                write(path, found)
            print(f"{piece.name}: {told(found)}, {found['seconds']:.0f} s", flush=True)
        holds = holds and found["holds"]
    return 0 if holds else 1


def measured(piece: Piece, args: argparse.Namespace, left: float) -> Found:
    device, began = args.device, time.monotonic()
    try:
        found = (
            piece.run(device=device, budget=None if left == float("inf") else left)
            if piece.limited
            else piece.run(device=device)
        )
    except Exception as error:  # noqa: BLE001 - one piece that fails must not keep the others from running
        found = {"error": f"{type(error).__name__}: {error}", "holds": False}
    if device == "cuda":
        torch.cuda.empty_cache()
    about = {"device": device, "hardware": machine(device), "seconds": time.monotonic() - began}
    about["commit"] = args.commit or commit()
    return {**found, **about}


def write(path: Path, found: Found) -> None:
    """Whole or not at all: whoever stops the script half-way finds no half of a result."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(found, indent=1) + "\n")
    unfinished.replace(path)


def told(found: Found) -> str:
    if found.get("unfinished"):
        return f"{len(found['runs'])} runs are finished, goes on with --resume"
    return "holds" if found["holds"] else f"DOES NOT HOLD ({found.get('error') or found.get('off') or 'see its file'})"


if __name__ == "__main__":
    sys.exit(main())
