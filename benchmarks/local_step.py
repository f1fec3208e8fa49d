"""Time, FLOPs and memory of a training step: end to end, LoCo and what one would do instead of either.

    python benchmarks/local_step.py                                  # ResNet-50, fp32, eager
    python benchmarks/local_step.py --archs resnet50 vit_s --dtype bfloat16 --write docs/benchmarks
    python benchmarks/local_step.py --rows end-to-end loco gim --repeats 1 --batch-size 2 --image-size 96

Times are medians of steps in turn, so that ratios come from one run; nothing else should compute meanwhile. FLOPs and bytes
are counted under fake tensors at the sizes of `--count-batch-size` and `--count-image-size`, and are the same everywhere.
"Peak" is the most bytes that are alive at once on the device, without weights, their gradients and the views; "saved" the
most that are kept for a backward. "Fits" is the largest batch, in images of two views each, for which weights, their
gradients, the views and the peak fit into `--budget`, by a straight line through the peaks at two sizes.

With `--write`, what was measured is kept in `local_step.json` there, count by count and network by network: nothing is
counted again while the code is the same, and the page shows all networks, precisions and modes that were ever timed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from copy import deepcopy
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hardware import commit, machine
from networks import NETWORKS
from overhead import own_seconds, per_stage
from step_page import pictures, text
from steps import ROWS, Counts, Setting, Steps, count, cuda_peak, interleaved, largest_batch
from tqdm import tqdm

import locallearn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from command_line import Parser, at_least, number_from, write

progress = partial(tqdm, leave=False, file=sys.stderr)


def measure_times(args: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """A table's part that depends on the machine."""
    if not args.repeats:
        return {"times": {}, "eager": {}, "cuda_peak_bytes": {}, "own_share": None}
    device = args.device
    backbone = setting.network.make(setting.image_size).to(device)
    images = setting.images(device)
    steps = Steps(setting, backbone, images)
    chosen = {key: steps.step(ROWS[key]) for key in args.rows}
    eager = {}
    if args.compile:
        plain = Steps(setting, deepcopy(backbone), images)
        eager = {f"{key}, eager": plain.step(ROWS[key]) for key in args.rows}
        steps.compile()
    cuda = {key: cuda_peak(step) for key, step in chosen.items()} if device == "cuda" else {}
    before = os.times()
    times = interleaved(chosen | eager, args.repeats, partial(progress, desc=f"{setting.arch}, time"))
    after = os.times()
    own = after.user + after.system - before.user - before.system
    few = Steps(replace(setting, batch_size=2), backbone, images[:4])
    return {
        "times": {key: times[key] for key in chosen},
        "eager": {key: times[f"{key}, eager"] for key in chosen} if eager else {},
        "cuda_peak_bytes": cuda,
        "own_share": own_seconds(few.step(ROWS["loco"])) / median(times["loco"]) if "loco" in chosen else None,
        "processes": own / (after.elapsed - before.elapsed),
        "load": os.getloadavg()[0],
    }


def measure_counts(args: argparse.Namespace, setting: Setting, known: dict[str, Any]) -> dict[str, Any]:
    """A table's part that does not depend on the machine: per row what a step takes, and the largest batch that fits."""
    found, now = {}, f"torch {torch.__version__}, {sources()}"
    for name in [name for name in known if not name.endswith(now)]:
        del known[name]
    for key in progress(args.rows, desc=f"{setting.arch}, count"):
        row, sizes = ROWS[key], (setting.batch_size // 2, setting.batch_size)
        both = []
        for images in sizes:
            here = Setting(setting.arch, images, setting.image_size, setting.dtype)
            name = f"{key} {here.arch} {images} {here.image_size} {here.dtype} {now}"
            if name not in known:
                known[name] = count(here, row, 2 * setting.batch_size // row.parts)
                save(args)
            both.append(Counts(*known[name]))
        fits = largest_batch(*zip(sizes, both, strict=True), setting.image_size, 1e9 * args.budget)
        found[key] = {**both[1]._asdict(), "fits": fits}
    return found


def sources() -> str:
    """A mark of everything by which a count can change."""
    own = Path(__file__).parent
    files = [
        *Path(locallearn.__file__).parent.rglob("*.py"),
        *(own / f"{name}.py" for name in ("networks", "rivals", "steps")),
    ]
    return sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:12]


def save(args: argparse.Namespace) -> None:
    if args.write:
        write(args.write / "local_step.json", lambda path: path.write_text(json.dumps(args.record, indent=1) + "\n"))


def save_page(args: argparse.Namespace) -> None:
    save(args)
    if args.write:
        write(args.write / "local_step.md", lambda path: path.write_text(text(args.record)))
        pictures(args.record, args.write)


def measure_overhead(args: argparse.Namespace) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    stages = 64
    ours, by_hand = per_stage(stages)
    torch.set_num_threads(threads)
    return {"stages": stages, "ours": ours, "by_hand": by_hand, "machine": machine(args.device, "torchvision")}


def parser() -> Parser:
    result = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    on_gpu = torch.cuda.is_available()
    add("--archs", nargs="+", choices=NETWORKS, default=["resnet50"], metavar="ARCH", help=", ".join(NETWORKS))
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 by autocast (%(default)s)")
    add("--compile", action="store_true", help="every block and decoder, one by one")
    add("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu", help="(%(default)s)")
    add("--repeats", type=at_least(0), default=5, metavar="N", help="steps of each row; 0 only counts (%(default)s)")
    add("--batch-size", type=at_least(2), metavar="N", help="images of two views each, timed: 8, and 32 on a GPU")
    add("--image-size", type=at_least(65), metavar="PIXELS", help="of the timed ones: 128, and 224 on a GPU")
    add("--count-batch-size", type=at_least(8), default=32, metavar="N", help="images of two views (%(default)s)")
    add("--count-image-size", type=at_least(65), default=224, metavar="PIXELS", help="(%(default)s)")
    add("--budget", type=number_from(0, above=True), default=16.0, metavar="GB", help="for what fits (%(default)s)")
    add("--threads", type=at_least(1), default=torch.get_num_threads(), metavar="N", help="(%(default)s)")
    add("--write", type=Path, metavar="DIR", help="keep what is measured there, with a page and its pictures")
    return result


def main(argv: list[str] | None = None) -> int:
    arguments = parser()
    args = arguments.parse_args(argv)
    on_gpu = args.device == "cuda"
    batch_size, image_size = args.batch_size or (32 if on_gpu else 8), args.image_size or (224 if on_gpu else 128)
    for size in (image_size, args.count_image_size):
        if "vit_s" in args.archs and size % 16:
            arguments.error(f"vit_s takes patches of 16 pixels, got images of {size}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    kept = args.write and args.write / "local_step.json"
    args.record = json.loads(kept.read_text()) if kept and kept.exists() else {"counts": {}, "tables": {}}
    if args.write:
        args.write.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, args.dtype)
    if args.repeats:
        args.record["overhead"] = measure_overhead(args)
    for arch in args.archs:
        counted = Setting(arch, args.count_batch_size, args.count_image_size, dtype)
        timed = Setting(arch, batch_size, image_size, dtype)
        table = {
            "arch": arch,
            "dtype": args.dtype,
            "compiled": args.compile,
            "device": args.device,
            "budget": args.budget,
            "counted": [args.count_batch_size, args.count_image_size],
            "timed": [batch_size, image_size, args.repeats],
            "command": shlex.join(["python", "benchmarks/local_step.py", *(sys.argv[1:] if argv is None else argv)]),
            "machine": machine(args.device, "torchvision"),
            "commit": commit(),
            "counts": measure_counts(args, counted, args.record["counts"]),
            **measure_times(args, timed),
        }
        args.record["tables"][f"{arch} {args.dtype} {'compiled' if args.compile else 'eager'} {args.device}"] = table
        save_page(args)
    print(text(args.record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
