"""Tables 6 and 7: what the stages of a backbone hold and cost, and what a step of SimCLR, Greedy InfoMax and LoCo takes.

    python examples/memory.py                        # PResNet-50, two views of 32 images of 224 pixels: 64 in one batch
    python examples/memory.py --arch resnet50        # the table in README.md; --markdown prints it as it stands there
    python examples/memory.py --arch vit_b_16        # four equal stages of three transformer blocks

Runs under fake tensors: no GPU, no data, about a minute on a CPU. The counts do not depend on the machine. They leave out
what all rows share (weights, their gradients, the images) and what a GPU's libraries and the allocator add; where there
is a GPU, a column tells what it really took.

"peak" is the most bytes that are alive at once; "saved" the most that are kept for a backward at once, and "predicted"
the same from the stages alone: the largest unit's, and its decoder's. What is recomputed in the backward counts for the
peak only. The rows "blocks recomputed" have checkpoint=True, which recomputes every block, and the stem; "blocks and
stages recomputed" recompute the stages too, so that of a stage that two units share only its inlet is kept between them.

The paper's 4.56x and 2.76x (ResNet-50: 1.81x and 1.28x) are ratios of peaks to end-to-end training. Its own count of a
stage is in the column beside ours. It has 128 base channels in PResNet-50's third stage, where its text, its Table 8
and its FLOPs have 144; so have we, and so that stage weighs 1.9 points more here than there.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import stoppable

import torch
from command_line import Parser, at_least, status_of, write
from counting.paper_counts import StageCount, paper_counts, shares
from counting.step_costs import (
    COUNTED,
    DECODER_WIDTHS,
    Method,
    Parts,
    Setting,
    counted,
    decoder_costs,
    methods,
    on_cuda,
    parts,
    predicted,
    size,
)
from curves.costs import machine
from drawing.figure_style import FAINT, METHODS, STYLE
from inputs.image_sets import DataError
from matplotlib import rc_context
from matplotlib.figure import Figure
from pretraining.runs import commit
from rich.box import SIMPLE_HEAVY
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from tqdm import tqdm

# Table 6: memory and FLOPs in percent of all stages; Table 7: the saving of a method
PAPER_STAGES = {
    "resnet50": ([43.64, 29.09, 21.82, 5.45], [19.39, 25.09, 35.80, 19.73]),
    "presnet50": ([15.46, 10.96, 19.48, 17.31, 19.48, 17.31], [13.50, 14.63, 14.77, 16.62, 20.45, 20.04]),
}
PAPER_SAVING = {("resnet50", 0): 1.81, ("resnet50", 1): 1.28, ("presnet50", 0): 4.56, ("presnet50", 1): 2.76}


WIDTH = 100  # characters at most: 80, and a column more with CUDA; on a narrower terminal no number is cut


@dataclass(frozen=True)
class StageRow:
    """Shares are in percent of all stages; None where the paper has no number, or where its count finds no map."""

    stage: str
    memory_by_paper_count: float | None
    memory_in_paper: float | None
    flops_by_paper_count: float
    flops_in_paper: float | None
    saved_share: float
    saved_bytes: int
    decoder_saved_bytes: int


@dataclass(frozen=True)
class DecoderRow:
    """A decoder on every outlet: FLOPs of a step in all of them together, and the most that one of them saves."""

    decoder: str
    gflop: float
    saved_bytes: int


@dataclass(frozen=True)
class MethodRow:
    """What a step costs, and by how much less than SimCLR's."""

    method: str
    gflop: float
    flops_relative: float
    peak_bytes: int
    peak_saving: float
    predicted_saved_bytes: int
    saved_bytes: int
    saved_saving: float
    saving_in_paper: float | None
    cuda_peak_bytes: int | None


@dataclass(frozen=True)
class Tables:
    """All that is printed, drawn and written."""

    setting: Setting
    gmacs: float
    stages: list[StageRow]
    decoders: list[DecoderRow]
    methods: list[MethodRow]


def count(setting: Setting) -> Tables:
    """Everything, by fake tensors."""
    counts = count_stages(setting)
    found = parts(setting, Method("", 0))
    rows = list(tqdm(map(partial(method_row, setting), methods(setting)), total=len(methods(setting)), leave=False))
    simclr = rows[0]
    return Tables(
        setting,
        sum(stage.flops for stage in counts) / 1e9,
        stage_rows(setting, counts, found),
        decoder_rows(setting, found.outlets),
        [
            replace(
                row,
                flops_relative=row.gflop / simclr.gflop,
                peak_saving=simclr.peak_bytes / row.peak_bytes,
                saved_saving=simclr.saved_bytes / row.saved_bytes,
            )
            for row in rows
        ],
    )


def count_stages(setting: Setting) -> list[StageCount]:
    """By the paper's count, for one image."""
    fake = FakeTensorMode()
    with FakeCopyMode(fake):
        backbone = setting.backbone()
    with fake:
        return paper_counts(backbone, setting.stages, setting.images()[:1])


def stage_rows(setting: Setting, counts: list[StageCount], found: Parts) -> list[StageRow]:
    unknown: list[float | None] = [None] * len(counts)
    memory = shares([stage.memory for stage in counts]) if counts[-1].memory else unknown
    papers = PAPER_STAGES.get(setting.arch, (unknown, unknown))
    saved = [size([stage]) for stage in found.stages]
    decoders = [cost.saved_bytes for cost in decoder_costs(setting, Method("", 0), found.outlets)]
    flops = shares([stage.flops for stage in counts])
    columns = (setting.stages, memory, papers[0], flops, papers[1], shares(saved), saved, decoders)
    return [StageRow(*row) for row in zip(*columns, strict=True)]


def decoder_rows(setting: Setting, outlets: list[Tensor]) -> list[DecoderRow]:
    """The MLP alone, the block of the setting's width, and the one as wide as its outlet if that is another."""
    kinds = {"MLP": Method("", 0, block=False)}
    if setting.decoder_width:
        kinds[f"block of at most {setting.decoder_width} channels, MLP"] = Method("", 0)
    kinds["block as wide as its outlet, MLP"] = Method("", 0, full_width=True)

    def row(name: str, kind: Method) -> DecoderRow:
        costs = decoder_costs(setting, kind, outlets)
        return DecoderRow(name, sum(cost.flops for cost in costs) / 1e9, max(cost.saved_bytes for cost in costs))

    return [row(name, kind) for name, kind in kinds.items()]


def method_row(setting: Setting, method: Method) -> MethodRow:
    """Not yet compared with SimCLR's."""
    cost = counted(setting, method)
    return MethodRow(
        method.name,
        cost.flops / 1e9,
        1.0,
        cost.peak_bytes,
        1.0,
        predicted(setting, method, parts(setting, method)),
        cost.saved_bytes,
        1.0,
        None if method.checkpoint or method.full_width else PAPER_SAVING.get((setting.arch, method.overlap)),
        on_cuda(setting, method) if torch.cuda.is_available() else None,
    )


# ------------------------------------------------------------------------------------------------------- shown


def title(setting: Setting) -> str:
    return (
        f"{setting.arch}, two views of {setting.batch_size} images of {setting.image_size} pixels, fp32, "
        f"torch {torch.__version__}"
    )


def megabytes(count: int | None) -> str:
    return "" if count is None else three_digits(count / 1e6)


def three_digits(number: float) -> str:
    """At least, where it has so many: 1,234 and 123, 12.3, 0.0123."""
    decimals = 2 - math.floor(math.log10(number)) if 0 < number < 100 else 0
    return f"{number:,.{decimals}f}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2f}"


def new_table(heading: str, first: str, *columns: str) -> Table:
    table = Table(title=heading, box=SIMPLE_HEAVY, padding=0, show_edge=False, title_justify="left")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def show(tables: Tables) -> None:
    console = Console(width=max(WIDTH, Console().width))
    stages = new_table(
        f"Stages: {three_digits(tables.gmacs)}G multiply-accumulates by the paper's count (Table 6), shares in %",
        "stage",
        "memory,\npaper's count",
        "in the\npaper",
        "FLOPs,\npaper's count",
        "in the\npaper",
        "saved\nby us",
        "that is,\nMB",
        "and in its\ndecoder, MB",
    )
    for stage in tables.stages:
        numbers = [
            percent(share)
            for share in (
                stage.memory_by_paper_count,
                stage.memory_in_paper,
                stage.flops_by_paper_count,
                stage.flops_in_paper,
                stage.saved_share,
            )
        ]
        stages.add_row(stage.stage, *numbers, megabytes(stage.saved_bytes), megabytes(stage.decoder_saved_bytes))
    decoders = new_table("What a decoder on every outlet costs", "decoder", "GFLOP\nof a step", "saves at\nmost, MB")
    for decoder in tables.decoders:
        decoders.add_row(decoder.decoder, three_digits(decoder.gflop), megabytes(decoder.saved_bytes))
    columns = ["GFLOP", "", "peak,\nMB", "less\nby", "saved,\nMB", "less\nby", "in the\npaper"]
    with_cuda = tables.methods[0].cuda_peak_bytes is not None
    steps = new_table("A training step (Table 7)", "training", *columns, *(["CUDA\npeak, MB"] if with_cuda else []))
    for row in tables.methods:
        steps.add_row(
            row.method,
            three_digits(row.gflop),
            f"{row.flops_relative:.2f}x",
            megabytes(row.peak_bytes),
            f"{row.peak_saving:.2f}x",
            megabytes(row.saved_bytes),
            f"{row.saved_saving:.2f}x",
            "" if row.saving_in_paper is None else f"{row.saving_in_paper:.2f}x",
            *([megabytes(row.cuda_peak_bytes)] if with_cuda else []),
        )
    console.print(title(tables.setting))
    for table in (stages, decoders, steps):
        console.print(table, end="\n\n")


def markdown(rows: Sequence[MethodRow]) -> str:
    """The methods as README.md has them."""
    lines = ["| training | GFLOP | | peak, MB | less by | saved, MB | less by |", "|---|--:|--:|--:|--:|--:|--:|"]
    lines += [
        f"| {row.method} | {three_digits(row.gflop)} | {row.flops_relative:.2f}x "
        f"| {megabytes(row.peak_bytes)} | {row.peak_saving:.2f}x | {megabytes(row.saved_bytes)} | {row.saved_saving:.2f}x |"
        for row in rows
    ]
    return "\n".join(lines)


def draw(tables: Tables, path: Path) -> None:
    """Table 7 as bars: how much less than SimCLR's, counted in both ways, with the paper's as marks."""
    rows = tables.methods
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 1 + 0.36 * len(rows)), layout="constrained", facecolor="white")
        panel = figure.subplots()
        places = range(len(rows))
        panel.barh(
            [p - 0.2 for p in places], [r.saved_saving for r in rows], 0.38, label="saved", color=METHODS["LoCo"]
        )
        panel.barh(
            [p + 0.2 for p in places], [r.peak_saving for r in rows], 0.38, label="peak", color=METHODS["SimCLR"]
        )
        paper = [(row.saving_in_paper, place) for place, row in enumerate(rows) if row.saving_in_paper]
        if paper:
            panel.scatter(*zip(*paper, strict=True), marker="D", color="black", label="in the paper", zorder=3)
        panel.axvline(1, color=FAINT, linewidth=1)
        panel.set_yticks(places, [row.method.replace("`", "") for row in rows])
        panel.invert_yaxis()
        panel.set_xlabel("times less than SimCLR with its MLP decoder")
        panel.set_title(title(tables.setting))
        panel.legend(frameon=False)
        figure.savefig(path, format="png", dpi=130)


def write_csv(rows: Sequence[StageRow | DecoderRow | MethodRow], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, asdict(rows[0]))
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def save(tables: Tables, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    everything = {
        "torch": torch.__version__,
        "commit": commit(),
        "machine": machine(torch.device("cpu")),
        **asdict(tables),
    }
    write(out / "memory.json", lambda path: path.write_text(json.dumps(everything, indent=1) + "\n"))
    for name in ("stages", "decoders", "methods"):
        write(out / f"{name}.csv", partial(write_csv, getattr(tables, name)))
    write(out / "memory.png", partial(draw, tables))


def parser() -> Parser:
    result = Parser(
        description=__doc__.split("\n\n")[0],
        epilog="example: python examples/memory.py --arch resnet50 --out runs/memory",
    )
    add = result.add_argument
    add("--arch", choices=COUNTED, default="presnet50", help="the backbone (%(default)s)")
    add("--batch-size", type=at_least(2), default=32, metavar="N", help="images; each has two views (%(default)s)")
    add("--image-size", type=at_least(8), metavar="PIXELS", help="224, and 32 for presnet_small")
    add(
        "--decoder-width",
        type=at_least(1),
        metavar="N",
        help="channels of the decoder's block at most (PResNet-50: 128)",
    )
    add("--markdown", action="store_true", help="print the methods only, as the table in README.md")
    add("--out", type=Path, metavar="DIR", help="write memory.json, memory.png and a CSV for each table there")
    return result


def run(args: argparse.Namespace) -> None:
    image_size = args.image_size or (32 if args.arch == "presnet_small" else 224)
    if args.arch == "vit_b_16" and image_size % 16:
        raise DataError(f"--arch vit_b_16 takes patches of 16 pixels, got --image-size {image_size}")
    width = args.decoder_width or DECODER_WIDTHS.get(args.arch)
    try:
        tables = count(Setting(args.arch, args.batch_size, image_size, width))
    except ValueError as problem:
        if "more than 1 value per channel" not in str(problem):  # what BatchNorm says of a single position
            raise
        raise DataError(
            f"--image-size {image_size} leaves a stage of {args.arch} a single position, of which BatchNorm has no "
            "statistics: take a larger one"
        ) from problem
    if args.markdown:
        print(markdown(tables.methods))
    else:
        show(tables)
    if args.out:
        save(tables, args.out)


def main(argv: list[str] | None = None) -> int:
    return status_of(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
