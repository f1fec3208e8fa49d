"""What does it cost to watch? `python benchmarks/monitor.py` times local steps with and without a Monitor, and top-1 alone.

Steps of all kinds take turns on one network, so that the machine's moods fall on all alike; what is printed are medians and
quartiles of ratios of neighbours. A smaller network or batch makes watching dearer, since it costs the same per unit.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hardware import commit, machine
from torchvision.models import resnet18

from locallearn import LocalWrapper, info_nce
from locallearn.diagnosis import Monitor

STAGES = ["layer1", "layer2", "layer3", "layer4"]


def seconds(step: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratios(
    base: Callable[[], object], others: dict[str, Callable[[], object]], turns: int, device: str
) -> dict[str, list[float]]:
    """By name: the quartiles of how many times as long as `base` it takes."""
    for step in (base, *others.values()):
        seconds(step, device)
    found: dict[str, list[float]] = {name: [] for name in others}
    for turn in range(turns):
        order = list(others) if turn % 2 else list(others)[::-1]
        whole = seconds(base, device)
        for name in order:
            found[name].append(seconds(others[name], device) / whole)
            whole = seconds(base, device)
    return {name: statistics.quantiles(values, n=4) for name, values in found.items()}


def table(record: dict[str, Any]) -> str:
    lines = ["| | time of a step beside a plain one, median | quartiles |", "|---|--:|---|"]
    for name, (low, middle, high) in record["rows"].items():
        lines.append(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} |")
    return "\n".join(lines) + "\n"


def read_too(model: LocalWrapper, monitor: Monitor, views: list[torch.Tensor]) -> None:
    model.local_step(*views)
    monitor.read()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32, help="images a step, two views of each (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="pixels (%(default)s)")
    parser.add_argument("--rows", type=int, default=2048, help="embeddings a view, for top-1 alone (%(default)s)")
    parser.add_argument("--turns", type=int, default=40, help="of each kind (%(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", type=Path, metavar="JSON", help="keep what is measured there")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    views = [torch.rand(args.batch, 3, args.size, args.size, device=args.device) for _ in range(2)]
    models = [LocalWrapper(resnet18().to(args.device), STAGES) for _ in range(3)]
    watched, read = (Monitor(model, every=1, settle=10**9) for model in models[1:])
    steps = {
        f"`Monitor(every=1)`, ResNet-18, {args.batch} images of {args.size} pixels": partial(
            models[1].local_step, *views
        ),
        "the same, and `read()`": partial(read_too, models[2], read, views),
    }
    found = ratios(partial(models[0].local_step, *views), steps, args.turns, args.device)
    watched.close()

    embeddings = [torch.randn(args.rows, 128, device=args.device, requires_grad=True) for _ in range(2)]

    def loss(*, top1: bool) -> None:
        result = info_nce(*embeddings, return_top1=top1)
        (result[0] if top1 else result).backward()

    alone = f"`return_top1` alone: `info_nce` and its backward, {args.rows:,} rows of 128 a view"
    found |= ratios(partial(loss, top1=False), {alone: partial(loss, top1=True)}, args.turns, args.device)
    record = {
        "command": shlex.join(["python", "benchmarks/monitor.py", *(sys.argv[1:] if argv is None else argv)]),
        "machine": machine(args.device, "torchvision"),
        "commit": commit(),
        "rows": found,
    }
    print(f"{record['machine']}\n\n{table(record)}")
    if args.write:
        args.write.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
