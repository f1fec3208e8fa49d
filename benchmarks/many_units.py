"""What a unit costs as there are more of them: a chain of equal stages, from 2 to 64.

    python benchmarks/many_units.py
    python benchmarks/many_units.py --write docs/benchmarks

Time is the median of steps in turn, of chains that are as deep as the row says. Memory is counted under fake tensors: the
most bytes alive at once in a step, without weights, their gradients and the views. End-to-end training of the same chain,
whose memory grows with every stage, is beside it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import rivals
import torch
from hardware import commit, machine
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rivals import Net
from steps import Step, interleaved
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from tqdm import tqdm

from locallearn import LocalWrapper, MLPDecoder
from locallearn.memory import measure

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from command_line import Parser, at_least, write
from drawing.figure_style import METHODS, STYLE, label_ends, quiet

METHOD_OVERLAPS = {"SimCLR": None, "Greedy InfoMax": 0, "LoCo": 1}


class Row(NamedTuple):
    """A chain: milliseconds per stage and peak bytes of a step, by method."""

    stages: int
    milliseconds: dict[str, float]
    peak_bytes: dict[str, int]


class Stage(nn.Module):
    """Two convolutions around a shortcut, on as many channels as come in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return (maps + self.branch(maps)).relu()


def new_step(chain: nn.Sequential, overlap: int | None, images: torch.Tensor) -> Step:
    """End to end where `overlap` is None."""
    model = LocalWrapper(
        chain, range(len(chain)), len(chain) - 1 if overlap is None else overlap, MLPDecoder, example=images
    )
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    if overlap is None:
        return partial(rivals.end_to_end, Net([[stage] for stage in chain], model.decoders, model.plan), images)
    return partial(model.local_step, *images.chunk(2))


def peak(chain: nn.Sequential, overlap: int | None, shape: tuple[int, ...]) -> int:
    fake = FakeTensorMode()
    with FakeCopyMode(fake):
        chain = deepcopy(chain)
    with fake:
        return measure(new_step(chain, overlap, torch.zeros(shape))).peak_bytes


def rows(depths: Sequence[int], channels: int, shape: tuple[int, ...], repeats: int) -> list[Row]:
    """Of chains whose stages work on `channels` channels, with a batch of `shape`."""
    chains = {depth: nn.Sequential(*[Stage(channels) for _ in range(depth)]) for depth in depths}
    images = torch.rand(shape)
    steps = {
        (depth, method): new_step(chain, overlap, images)
        for depth, chain in chains.items()
        for method, overlap in METHOD_OVERLAPS.items()
    }
    progress = partial(tqdm, leave=False, file=sys.stderr)
    times = interleaved(steps, repeats, partial(progress, desc="time"))
    return [
        Row(
            depth,
            {method: 1e3 * median(times[depth, method]) / depth for method in METHOD_OVERLAPS},
            {method: peak(chain, overlap, shape) for method, overlap in METHOD_OVERLAPS.items()},
        )
        for depth, chain in progress(chains.items(), desc="count")
    ]


def table(found: Sequence[Row]) -> str:
    lines = ["| stages | " + " | ".join(f"{m}: ms per stage | peak, MB" for m in METHOD_OVERLAPS) + " |"]
    lines.append("|" + "--:|" * (1 + 2 * len(METHOD_OVERLAPS)))
    for row in found:
        cells = [f"{row.milliseconds[m]:.2f} | {row.peak_bytes[m] / 1e6:.1f}" for m in METHOD_OVERLAPS]
        lines.append(f"| {row.stages} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(record: dict[str, Any]) -> str:
    """What is said of a record, which is what `main` writes."""
    found, shape = [Row(**row) for row in record["rows"]], " x ".join(map(str, record["shape"]))
    return f"""# Many units

A chain of equal stages, from {found[0].stages} to {found[-1].stages}: time of a step per stage, and the most bytes alive at once
in it, without weights, their gradients and the views. However many units there are, each takes the same time, and memory does not
grow with them; end to end, memory does. LoCo shares all stages but the first and the last, each for one input gradient more, so
that its time per stage rises while those two are a large part.

Batches of shape {shape}, MLP decoders; medians of steps in turn. `{record["command"]}`; {record["machine"]}.

![Time per stage, and peak, of chains of more and more stages](many_units.png)

{table(found)}
"""


def draw(found: Sequence[Row], path: Path) -> None:
    stages = [row.stages for row in found]
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 4), layout="constrained", facecolor="white")
        panels = figure.subplots(1, 2)
        curves = {
            "time per stage, ms": [[row.milliseconds[m] for row in found] for m in METHOD_OVERLAPS],
            "peak of live bytes, MB": [[row.peak_bytes[m] / 1e6 for row in found] for m in METHOD_OVERLAPS],
        }
        for panel, (heading, lines) in zip(panels, curves.items(), strict=True):
            colours = [METHODS[method] for method in METHOD_OVERLAPS]
            for line, colour in zip(lines, colours, strict=True):
                panel.plot(stages, line, color=colour, marker="o", linewidth=2)
            panel.set_xscale("log", base=2)
            panel.set_xticks(stages, [str(n) for n in stages])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.set_ylim(0)
            panel.set(title=heading, xlabel="stages of the chain")
            quiet(panel)
            label_ends(panel, list(METHOD_OVERLAPS), [(stages[-1], line[-1]) for line in lines], colours)
        figure.savefig(path, format="png", dpi=130)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stages", type=at_least(2), nargs="+", default=[2, 4, 8, 16, 32, 64], metavar="N", help="%(default)s")
    add("--channels", type=at_least(1), default=32, metavar="N", help="(%(default)s)")
    add("--image-size", type=at_least(1), default=32, metavar="PIXELS", help="(%(default)s)")
    add("--batch-size", type=at_least(2), default=16, metavar="N", help="images of two views each (%(default)s)")
    add("--repeats", type=at_least(1), default=5, metavar="N", help="steps of each chain (%(default)s)")
    add("--threads", type=at_least(1), default=torch.get_num_threads(), metavar="N", help="(%(default)s)")
    add("--write", type=Path, metavar="DIR", help="write many_units.md, .json and .png there")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = (2 * args.batch_size, args.channels, args.image_size, args.image_size)
    found = rows(sorted(args.stages), args.channels, shape, args.repeats)
    print(f"batches of {shape}, {args.threads} threads, torch {torch.__version__}\n\n{table(found)}")
    if args.write:
        args.write.mkdir(parents=True, exist_ok=True)
        record = {
            "command": shlex.join(["python", "benchmarks/many_units.py", *(sys.argv[1:] if argv is None else argv)]),
            "machine": machine("cpu"),
            "commit": commit(),
            "shape": shape,
            "rows": [row._asdict() for row in found],
        }
        write(args.write / "many_units.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
        write(args.write / "many_units.png", partial(draw, found))
        write(args.write / "many_units.md", lambda path: path.write_text(page(record)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
