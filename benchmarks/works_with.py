"""Which networks work: torchvision's and timm's families, Hugging Face's, and others, each against plain autograd.

    python benchmarks/works_with.py --write docs                        # whatever has no row yet
    python benchmarks/works_with.py --write docs --kind timm --jobs 2   # of one kind
    python benchmarks/works_with.py --only resnet18 "timm dla34"        # these, printed

A row is a network that is small or gets small images, in training mode, with random weights, cut by `stages_of` or where its
list says. It is compared with one plain backward per unit in double precision, with `checkpoint=` too, and `stages="auto"`
is timed in seconds of the CPU. Each runs in a process of its own, so that a crash or a timeout is a row that says so.

With `--write`, `works-with.json` there keeps every row as soon as it is there, and `works-with.md` is made of it. A network that
has a row is left out, unless `--only` names it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from hardware import commit, processor, versions
from tqdm import tqdm
from works.hugging_face import transformers_networks
from works.image_networks import timm_networks, torchvision_networks
from works.kinds import Network
from works.own_networks import own_networks
from works.page import text
from works.row import row

NAME = "works-with"
KINDS = {
    "torchvision": torchvision_networks,
    "timm": timm_networks,
    "transformers": transformers_networks,
    "own": own_networks,
}
PROCESSES = multiprocessing.get_context("forkserver")  # which imports what takes seconds once
PROCESSES.set_forkserver_preload(
    ["torchvision", "timm", "transformers.models.auto.modeling_auto", "locallearn.testing"]
)


@cache
def networks() -> dict[str, Network]:
    return {name: network for kind in KINDS.values() for name, network in kind().items()}


def _child(name: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        found = row(networks()[name])
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the row
        found = {"kind": networks()[name].kind, "failed": f"{type(error).__name__}: {error}"}
    pipe.send(found)


def alone(name: str, timeout: float) -> dict[str, Any]:
    """A row, in a process of its own."""
    start, (ours, theirs) = monotonic(), PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_child, args=(name, theirs), daemon=True)
    process.start()
    theirs.close()
    failed = {"kind": networks()[name].kind}
    try:
        found = ours.recv() if ours.poll(timeout) else {**failed, "failed": f"not done after {timeout:g} seconds"}
    except EOFError:
        process.join()
        found = {**failed, "failed": f"the process ended with status {process.exitcode}"}
    process.kill()
    process.join()
    return {**found, "wall_seconds": round(monotonic() - start, 1)}


def rows(names: list[str], jobs: int, timeout: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows as they are done."""
    pool = ThreadPoolExecutor(jobs)
    futures = {pool.submit(alone, name, timeout): name for name in names}
    try:
        for future in tqdm(as_completed(futures), total=len(futures), file=sys.stderr):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def keep(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all; the page beside it."""
    order = {name: at for at, name in enumerate(networks())}
    record["rows"] = dict(sorted(record["rows"].items(), key=lambda pair: order.get(pair[0], len(order))))
    record["missing"] = [name for name in networks() if name not in record["rows"]]
    for target, content in ((path, json.dumps(record, indent=1) + "\n"), (path.with_suffix(".md"), text(record))):
        fresh = target.with_suffix(".new")
        fresh.write_text(content)
        os.replace(fresh, target)  # noqa: PTH105 - atomic, and says so


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows, once more")
    parser.add_argument("--kind", choices=KINDS, help="networks of this kind")
    parser.add_argument("--write", type=Path, metavar="DIR", help="keep rows there, and write the page")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one")
    args = parser.parse_args()
    names = [name for name, network in networks().items() if args.kind in (None, network.kind)]
    if unknown := [name for name in args.only or () if name not in names]:
        parser.error(f"no networks {unknown}; there are {names}")
    path = None if args.write is None else args.write / f"{NAME}.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else {"rows": {}}
    names = args.only or [name for name in names if name not in record["rows"]]
    made = {"commit": commit(), "versions": versions("torch", "torchvision", "timm", "transformers")}
    made["machine"] = f"{processor()}, one thread"
    for name, found in rows(names, args.jobs, args.timeout):
        record["rows"][name] = {**found, **made}
        if path is None:
            print(name, json.dumps(record["rows"][name], indent=1))
        else:
            keep(path, record)
    if path is not None:
        keep(path, record)


if __name__ == "__main__":
    main()
