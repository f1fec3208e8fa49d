"""Two processes of one thread each: pipelines of local units, torch's pipelines, data parallel, and what two cores can do.

    python benchmarks/scale.py                       # prints the table
    python benchmarks/scale.py --write docs/benchmarks

All ways train the same chain of blocks, cut into four stages, two on each rank: once few channels on large maps, as low in a
ResNet, once many on small ones, as high in it. They take turns, some steps at a time, for some rounds; a row is the median
over rounds. Two cores of one machine are not twice one: in the row `ceiling` both processes work at once, by themselves, on half
of the steps each, and every other row is given as a share of it, too.

The same costs, measured stage by stage, go into a replay (`replay.py`), which says what the schedules do on more ranks.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import scale_page
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hardware import commit, machine
from replay import Costs
from stage_costs import stage_costs
from torchvision.models import resnet50, vit_b_16
from ways import PARTS, Setting, Way, ways, wrapped

from locallearn import ConvMLPDecoder, LocalWrapper, TokenDecoder, plan_stages
from locallearn.memory import measure

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from command_line import Parser, at_least, write

SETTINGS = (Setting(width=64, pixels=16), Setting(width=256, pixels=4))


def timed(way: Way, steps: int) -> float:
    """Seconds until both processes have done their steps of a round."""
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(round(steps * way.share) if way.step is not None else 0):
        way.step()  # type: ignore[misc]
    way.flush()
    dist.barrier()
    return time.perf_counter() - begin


def work(rank: int, folder: str, setting: Setting, steps: int, rounds: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    every = ways(setting, rank)
    seconds: dict[str, list[float]] = {way.name: [] for way in every}
    for way in every:
        timed(way, 2)
    for count in range(rounds):
        begin = count % len(every)
        for way in every[begin:] + every[:begin]:
            seconds[way.name].append(timed(way, steps) / steps)
        if rank == 0:
            print(f"round {count + 1} of {rounds}", file=sys.stderr)
    rows = {}
    for way in every:
        before = way.sent()
        peak = measure(way.step).peak_bytes if way.step is not None else 0
        sent = way.sent() - before + way.sent_each_step
        way.flush()
        rows[way.name] = {"method": way.method, "seconds": seconds[way.name], "peak_bytes": peak, "sent": sent}
    costs = {}
    if rank == 0:
        for parts in (1, *PARTS):
            images = torch.rand(setting.rows // parts, setting.width, setting.pixels, setting.pixels)
            part = stage_costs(wrapped(setting, 0), images)
            costs[str(parts)] = [Costs(*(parts * seconds for seconds in cost))._asdict() for cost in part]
    dist.barrier()
    Path(folder, f"{rank}.json").write_text(json.dumps({"rows": rows, "costs": costs}))
    dist.destroy_process_group()


def network_costs(device: str, rows: int) -> dict[str, dict[str, list[Costs]]]:
    """Of real backbones, cut for each number of ranks, two stages each: the twelve blocks of a ViT make no sixteen."""
    found: dict[str, dict[str, list[Costs]]] = {}
    makers: dict[str, tuple[Callable[[], Any], Any, Sequence[int]]] = {
        "ResNet-50": (resnet50, ConvMLPDecoder, (2, 4, 8)),
        "ViT-B/16": (vit_b_16, TokenDecoder, (2, 4)),
    }
    for name, (make, decoder, ranks) in makers.items():
        images = torch.rand(rows, 3, 224, 224, device=device)
        found[name] = {}
        for count in ranks:
            planned = plan_stages(make(), images.cpu(), ranks=count, decoder=decoder)
            model = LocalWrapper(make().to(device), planned.stages, 0, decoder, example=images[:2])
            found[name][str(count)] = stage_costs(model, images)
    return found


def collect(setting: Setting, steps: int, rounds: int) -> dict[str, Any]:
    """Both ranks' results as one record."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder, setting, steps, rounds), nprocs=2)
        both = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]
    rows = {}
    for name, row in both[0]["rows"].items():
        other = both[1]["rows"][name]
        rows[name] = {
            "method": row["method"],
            "seconds": [max(pair) for pair in zip(row["seconds"], other["seconds"], strict=True)],
            "peak_bytes": [row["peak_bytes"], other["peak_bytes"]],
            "sent": [row["sent"], other["sent"]],
        }
    return {"rows": rows, "costs": both[0]["costs"], "setting": setting._asdict(), "steps": steps}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least(1), default=9)
    parser.add_argument(
        "--steps", type=at_least(2), default=16, help="in a round, after which pipelines run empty; an even number"
    )
    parser.add_argument("--networks", metavar="DEVICE", help="also measure the stages of ResNet-50 and ViT-B/16 there")
    parser.add_argument("--network-rows", type=at_least(2), default=64, help="images in their batch")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="keep scale.json, scale.md and pictures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {}
    if args.networks:
        networks = network_costs(args.networks, args.network_rows)
        record["networks"] = {
            name: {ranks: [cost._asdict() for cost in costs] for ranks, costs in by_ranks.items()}
            for name, by_ranks in networks.items()
        }
        record["network_machine"] = f"{args.network_rows} images of 224 pixels; {machine(args.networks)}"
    record["chains"] = [collect(setting, args.steps, args.rounds) for setting in SETTINGS]
    record["commit"] = commit()
    record["machine"] = f"two processes of one thread each on {machine('cpu')}"
    record["command"] = shlex.join(["python", "benchmarks/scale.py", *sys.argv[1:]])
    print(scale_page.text(record))
    if args.write is not None:
        args.write.mkdir(parents=True, exist_ok=True)
        write(args.write / "scale.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
        write(args.write / "scale.md", lambda path: path.write_text(scale_page.text(record)))
        scale_page.pictures(record, args.write)


if __name__ == "__main__":
    main()
