"""Rows of a table of the paper as runs over seeds: pretrain, read out, and print mean and spread beside the paper's number.

A row's runs lie in `--out/ROW/seed-K`. What is finished is not run again: stopped or killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import linear_eval
import pretrain
from command_line import Parser, at_least, device, read_json, status_of, write
from drawing.figure_style import FAINT, GRID, INK, STYLE
from inputs.images import DataError
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAVY
from rich.console import Console
from rich.table import Table

PROTOCOLS = ("fast", "paper")
OURS = ("--method", "--overlap", "--decoder", "--sharing", "--seed", "--out", "--resume")  # set row by row


@dataclass(frozen=True)
class Row:
    """A row of the paper's table: pretrain.py's settings, and the linear top-1 on ImageNet in %, 100 epochs."""

    text: str
    method: str
    decoder: str
    sharing: str
    paper: float

    @property
    def name(self) -> str:
        """Also the directory's."""
        return "_".join((self.method, self.decoder, *([] if self.sharing == "hard" else [self.sharing])))

    def arguments(self) -> list[str]:
        return ["--method", self.method, "--decoder", self.decoder, "--sharing", self.sharing]


@dataclass(frozen=True)
class Ablation:
    """A table of the paper, and the arguments of pretrain.py with which it makes sense where none are given."""

    title: str
    rows: tuple[Row, ...]
    defaults: dict[str, str] = field(default_factory=dict)


@dataclass
class Results:
    """A row's top-1 in %, by seed."""

    row: Row
    top1: dict[int, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        known = list(self.top1.values())
        return {
            "row": self.row.name,
            "text": self.row.text,
            "method": self.row.method,
            "paper": self.row.paper,
            "mean": statistics.mean(known) if known else None,
            "std": statistics.stdev(known) if len(known) > 1 else None,
            "seeds": dict(self.top1),
        }


# ------------------------------------------------------------------------------------------------------- the runs


def run_row(row: Row, seed: int, args: argparse.Namespace) -> float:
    """The top stage's accuracy in %, from an earlier run if there is one with the same arguments."""
    directory = args.out / row.name / f"seed-{seed}"
    arguments = [*row.arguments(), "--seed", str(seed), *args.pretraining]
    asked = {"pretrain": arguments, "protocol": args.protocol}
    finished = directory / "row.json"
    if finished.is_file():
        known = read_json(finished)
        if {name: known[name] for name in asked} != asked:
            raise DataError(
                f"{directory} was run with other arguments: {shlex.join(known['pretrain'])}, --protocol {known['protocol']}; "
                "choose another --out"
            )
        return float(known["top1"])
    given = {name: getattr(args, name) for name in ("device", "threads")}
    here = [word for name, value in given.items() if value for word in (f"--{name}", str(value))]
    resume = ["--resume"] if args.protocol == "paper" else []
    _finish(pretrain.main([*arguments, *here, "--out", str(directory), "--resume", "auto"]))
    _finish(linear_eval.main([str(directory), "--protocol", args.protocol, *resume, *here]))
    written = max(directory.glob(f"linear_eval-{args.protocol}-*.json"), key=lambda path: path.stat().st_mtime_ns)
    top1 = 100 * json.loads(written.read_text())["accuracy"][-1]
    write(finished, lambda path: path.write_text(json.dumps({**asked, "top1": top1}, indent=1) + "\n"))
    return top1


def _finish(status: int) -> None:
    if status:
        raise KeyboardInterrupt


def all_rows(ablation: Ablation, args: argparse.Namespace) -> list[Results]:
    """All rows with the first seed, then all with the next: a table that is stopped early compares like with like."""
    results = [Results(row) for row in ablation.rows if not args.rows or row.name in args.rows]
    args.out.mkdir(parents=True, exist_ok=True)
    total = len(results) * args.seeds
    for number in range(total):
        seed, place = divmod(number, len(results))
        row = results[place].row
        print(f"[{number + 1}/{total}] {row.name}, seed {seed}", flush=True)
        results[place].top1[seed] = run_row(row, seed, args)
        save(ablation, results, args)
    return results


# ------------------------------------------------------------------------------------------------------- shown


def show(ablation: Ablation, results: Sequence[Results], args: argparse.Namespace) -> None:
    table = Table(title=heading(ablation, args), title_justify="left", box=SIMPLE_HEAVY, padding=(0, 1, 0, 0))
    table.add_column("row", no_wrap=True)
    table.add_column("")
    for name in ("top-1, %", "seeds", "in the\npaper"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        row = result.summary()
        spread = "" if row["std"] is None else f" ± {row['std']:.1f}"
        table.add_row(
            row["row"],
            row["text"],
            f"{row['mean']:.1f}{spread}",
            str(len(row["seeds"])),
            str(row["paper"]),
        )
    console = Console()
    console.print(table)
    console.print(
        "± standard deviation over seeds. The paper's are of ResNet-50 on ImageNet, 100 epochs. "
        "Its rows compare methods under different decoders: "
        "only those with the same decoder tell what a method is worth.",
        style="dim",
        highlight=False,
    )


def heading(ablation: Ablation, args: argparse.Namespace) -> str:
    run = pretrain.parser().parse_args(args.pretraining)
    data = Path(run.data.rpartition(":")[2]).stem
    return (
        f"{ablation.title}: {data}, {run.arch}, {run.epochs} epochs of batch {run.batch_size}, "
        f"{args.protocol} linear read-out"
    )


def save(ablation: Ablation, results: Sequence[Results], args: argparse.Namespace) -> None:
    """After every run, so that what is there can be looked at."""
    summaries = [result.summary() for result in results]
    contents = {"table": ablation.title, "pretrain": args.pretraining, "protocol": args.protocol, "rows": summaries}
    write(args.out / "results.json", lambda path: path.write_text(json.dumps(contents, indent=1) + "\n"))
    write(args.out / "results.csv", partial(_write_csv, summaries))
    write(args.out / "results.png", partial(draw, ablation, results, args))


def _write_csv(summaries: Sequence[dict[str, Any]], path: Path) -> None:
    seeds = max(len(summary["seeds"]) for summary in summaries)
    names = [name for name in summaries[0] if name != "seeds"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, *(f"seed {seed}" for seed in range(seeds))])
        for summary in summaries:
            writer.writerow([*(summary[name] for name in names), *summary["seeds"].values()])


def draw(ablation: Ablation, results: Sequence[Results], args: argparse.Namespace, path: Path) -> None:
    """Every seed as a dot, their mean as a line; the paper's numbers in a panel of their own, since the task is another."""
    with rc_context(STYLE):
        figure = Figure(figsize=(12, 1.6 + 0.4 * len(results)), layout="constrained", facecolor="white")
        ours, papers = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
        for place, result in enumerate(results):
            known = list(result.top1.values())
            ours.plot(known, [place] * len(known), "o", color=FAINT, markersize=5)
            if len(known) > 1:
                ours.plot([statistics.mean(known)] * 2, [place - 0.3, place + 0.3], color=INK, linewidth=2.5)
            papers.plot(result.row.paper, place, "D", color=INK, markersize=5)
        ours.set_yticks(range(len(results)), [f"{result.row.method}: {result.row.text}" for result in results])
        ours.set_ylim(len(results) - 0.5, -0.5)
        ours.set_xlabel("top-1, %: seeds and their mean")
        papers.set_xlabel("ResNet-50, ImageNet, top-1, %")
        papers.set_title("in the paper")
        for panel in (ours, papers):
            panel.grid(axis="x", color=GRID)
            panel.set_axisbelow(True)
        figure.suptitle(heading(ablation, args), x=0.012, ha="left", fontweight="bold")
        figure.savefig(path, format="png", dpi=130)


# ------------------------------------------------------------------------------------------------------- arguments


class PassingOn(Parser):
    """Keeps for pretrain.py what it does not know itself."""

    def parse_args(self, argv: Sequence[str] | None = None, namespace: None = None) -> argparse.Namespace:
        args, args.pretraining = self.parse_known_args(argv, namespace)
        return args


def parser(ablation: Ablation, script: str) -> Parser:
    result = PassingOn(
        allow_abbrev=False,  # `--seed` is pretrain.py's
        description=f"{ablation.title}: rows as runs over seeds. Arguments that are not listed here go to pretrain.py.",
        epilog=f"example: python examples/{script}.py --data cifar10 --arch resnet18 --epochs 100 --rows {ablation.rows[0].name}",
    )
    add = result.add_argument
    add("--rows", nargs="+", choices=[row.name for row in ablation.rows], metavar="ROW", help=_listed(ablation.rows))
    add("--seeds", type=at_least(1), default=3, metavar="N", help="seeds 0 to N - 1 (%(default)s)")
    add("--protocol", choices=PROTOCOLS, default="fast", help="of the linear read-out (%(default)s)")
    add("--device", type=device, help="cpu, cuda, ... (cuda where there is one)")
    add("--threads", type=at_least(1), metavar="N", help="of the CPU (torch's choice)")
    add("--out", type=Path, default=Path("runs", script), metavar="DIR", help="where the runs go (%(default)s)")
    return result


def _listed(rows: Sequence[Row]) -> str:
    return f"some of {', '.join(row.name for row in rows)} (all)"


def main(ablation: Ablation, script: str, argv: list[str] | None = None) -> int:
    """The whole of a script that runs `ablation`."""
    argv = sys.argv[1:] if argv is None else argv
    again = shlex.join(["python", f"examples/{script}.py", *argv])
    stopped = f"stopped; what is finished is not run again, go on with: {again}"
    return status_of(parser(ablation, script), partial(run, ablation), argv, stopped)


def run(ablation: Ablation, args: argparse.Namespace) -> None:
    """Every row with every seed, and the table of all."""
    given = {word.split("=")[0] for word in args.pretraining if word.startswith("--")}
    if own := sorted(word for word in given if any(name.startswith(word) for name in OURS)):
        raise DataError(f"{', '.join(own)}: this follows from the rows; choose them by --rows, and seeds by --seeds")
    for name, value in ablation.defaults.items():
        if name not in given:
            args.pretraining += [name, value]
    pretrain.parser().parse_args(args.pretraining)  # refuses what it does not know, before the first run
    show(ablation, all_rows(ablation, args), args)
    print(f"wrote {args.out}/results.json, results.csv and results.png")


if __name__ == "__main__":
    sys.exit(
        "error: ablation.py is what decoder_depth.py and sharing.py have in common: run one of them, or with --help"
    )
