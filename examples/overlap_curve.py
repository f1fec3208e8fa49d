r"""Accuracy against memory as the overlap grows: `python examples/overlap_curve.py --data cifar10.npz`.

One knob leads from greedy training (overlap 0) to end-to-end backpropagation (all stages but one). This trains a network at
every setting of it, by labels and by contrast, over several seeds and with the same decoder, initial weights, images and
views for all rows of a curve, and draws what each reaches against the memory that its step takes. Where the gap is largest
is known: ResNet-32 on CIFAR-10, cut into 16, errs on 24.6 % when trained greedily and on 7.4 % end to end (InfoPro's Table 2;
HPFF, which adds overlap 1, wins half of that back). `--preset gpu` is that setting; `--preset cpu`, the default, is a small
one, a few minutes a run on one core; `--preset gpu-short` is between (two of its curves took six minutes on an H200, 14 runs
at a time).

    python examples/overlap_curve.py --data data/cifar10.npz --threads 1            # start it twice: two runs at a time
    python examples/overlap_curve.py --data cifar10 --download --preset gpu --jobs 14   # share the card; best with MPS
    python examples/overlap_curve.py --times 20 --threads 1                         # what a step takes, row by row in turn
    python examples/overlap_curve.py --report docs/reproduce/overlap_curve.jsonl    # table and figure of finished runs

Each run has a directory, `--out/CURVE/ROW/seed-K`, with run.json, log.jsonl and checkpoints (as pretrain.py's: linear_eval.py and
figures.py read it). Stopped or killed at any moment, the same command goes on, and on a CPU a run ends with the same bits.
A finished run is one line of results.jsonl, a row's time one of times.jsonl; overlap_curve.png and overlap_curve.md are made of
nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import stoppable

import torch
from command_line import Parser, at_least, device, read_json, read_lines, status_of, write
from curves.claims import alone, claimed
from curves.costs import costs, machine, time_steps
from curves.graphed import GraphedStep
from curves.network import first, new_training
from curves.presets import PRESETS, START, Curve, Job, Setting, jobs
from curves.results import markdown, show
from drawing.overlap import draw_curves
from inputs.images import NAMES, DataError, Images, load, tell
from inputs.loading import plain_batches, view_batches
from inputs.views import shifted_views, simclr_views
from pretraining.draws import Draws
from pretraining.interrupt import interruptible
from pretraining.progress import Progress
from pretraining.runs import (
    commit,
    cut_log,
    is_finished,
    read_log,
    save_checkpoint,
    take_up,
    write_settings,
)
from pretraining.training import Training
from reading.evaluate import logistic_regression, stage_vectors
from torch import nn

import locallearn
from locallearn import LocalWrapper

# ------------------------------------------------------------------------------------------------------------- training


def train(job: Job, images: Images, training: Training, steps: int, directory: Path, asked: Callable[[], bool]) -> bool:
    """Train up to `steps`, with a checkpoint after every epoch; returns whether it came so far, and was not told to stop."""
    setting, model = job.setting, training.model
    on = next(model.parameters()).device
    supervised = setting.task == "supervised"
    view = shifted_views if supervised else simclr_views(images.size)
    draws = Draws(len(images.train), setting.batch_size, steps, job.seed, training.step)
    epoch = len(images.train) // setting.batch_size
    local_step = GraphedStep(model)
    progress = Progress(directory, steps, training.step, training.seconds, setting.batch_size, on, tensorboard=False)
    with progress:
        for seen, labels in view_batches(images, draws, view, on, views=1 if supervised else 2):
            views = [pixels.contiguous(memory_format=torch.channels_last) for pixels in seen]
            losses = local_step(views, labels if supervised else None)
            lr = training.update()
            progress.step()
            if training.step % 10 == 0 or training.step == steps:
                told = {"step": training.step, "epoch": training.step / epoch, "losses": losses.tolist(), "lr": lr}
                progress.record(told)
            stop = asked()
            if stop or training.step % epoch == 0 or training.step == steps:
                training.seconds = progress.seconds
                save_checkpoint(directory, training.step, training.state())
            if stop:
                break
    return training.step == steps


# --------------------------------------------------------------------------------------------------- what comes of it


def read_out(setting: Setting, model: LocalWrapper, images: Images) -> dict[str, Any]:
    """Accuracy on the held-out images, in 0..1: of a linear read-out of every stage, and of each unit's own classifier."""
    on = next(model.parameters()).device
    parts = [
        stage_vectors(model.backbone, setting.names, plain_batches(images, part, 512, on), len(labels))
        for part, labels in (("train", images.train_labels), ("test", images.test_labels))
    ]
    (known, known_labels), (held_out, held_out_labels) = parts
    stages = [
        logistic_regression(*(part.to(on) for part in (vectors, known_labels, others, held_out_labels)))
        for vectors, others in zip(known, held_out, strict=True)
    ]
    return {"accuracy": stages[-1], "stages_accuracy": stages, "units_accuracy": own_accuracies(model, images)}


@torch.no_grad()
def own_accuracies(model: LocalWrapper, images: Images) -> list[float] | None:
    """Of the units' classifiers; `None` where they have none."""
    if not isinstance(model.loss, nn.ModuleList):
        return None
    model.eval()
    right = torch.zeros(len(model.loss))
    for pixels, labels in plain_batches(images, "test", 512, next(model.parameters()).device):
        model(pixels, targets=labels)
        right += torch.tensor([loss.right for loss in model.loss])
    model.train()
    return (right / len(images.test_labels)).tolist()


# ------------------------------------------------------------------------------------------------------------ one run


def run_job(job: Job, images: Images, args: argparse.Namespace, asked: Callable[[], bool]) -> bool:
    """Go on with a run, or begin it; returns whether it is finished."""
    directory = args.out / job.place
    images = first(images, job.setting)
    settings = settings_of(job, images)
    if is_finished(directory, settings, resume=True):
        return True
    print(f"{job.place}: {len(images.train)} images, {job.setting.epochs} epochs", flush=True)
    steps = 0 if job.row == START else job.setting.epochs * (len(images.train) // job.setting.batch_size)
    training = new_training(job, images, steps, args.device)
    take_up(directory, training, steps)
    units = [[unit.first, unit.last] for unit in training.model.plan.units]
    write_settings(directory, settings | {"units": units})
    cut_log(directory, training.step)
    if training.step < steps and not train(job, images, training, steps, directory, asked):
        return False
    about = {
        "units": units,
        **read_out(job.setting, training.model, images),
        "losses": last_losses(directory, steps),
        **costs(job.setting, job.row, images.size),
        "ms_per_step": 1e3 * training.seconds / steps if steps else None,
        "commit": args.commit or commit(),
        "versions": {
            "locallearn": locallearn.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": f"{machine(args.device)}, {torch.get_num_threads()} threads, {platform.machine()}",
        "seconds": training.seconds,
    }
    write_settings(directory, settings | about)
    gather(args.out)
    print(f"{job.place}: {100 * about['accuracy']:.1f} %", flush=True)
    return True


def settings_of(job: Job, images: Images) -> dict[str, Any]:
    """What a run's results depend on, and what the other scripts want to know of it."""
    overlap = job.row if not job.row.isdigit() else int(job.row)
    run = {"curve": job.curve, "row": job.row, "seed": job.seed, "method": f"overlap {overlap}"}
    pixels = {"data": images.name, "image_size": images.size, "mean": [0.5] * 3, "std": [0.5] * 3}
    counts = {"images": len(images.train), "held_out": len(images.test)}
    return asdict(job.setting) | run | pixels | counts | {"stages": list(job.setting.names)}


def last_losses(directory: Path, steps: int) -> list[float] | None:
    """Each unit's loss, the mean of what was logged in the last tenth of the steps."""
    lines = [line["losses"] for line in read_log(directory) if line["step"] > 0.9 * steps]
    return torch.tensor(lines).mean(dim=0).tolist() if lines else None


# -------------------------------------------------------------------------------------------------- table and figure


def gather(out: Path) -> list[dict[str, Any]]:
    """results.jsonl: a line for each finished run in `out`."""
    with alone(out / "results.lock"):
        found = [read_json(path) for path in sorted(out.glob("*/*/seed-*/run.json"))]
        lines = [line for line in found if "seconds" in line]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write(out / "results.jsonl", lambda path: path.write_text(text))
    return lines


def report(paths: Sequence[Path], curves: Sequence[str] | None, out: Path) -> None:
    """Of all lines in these files, of results and of times; of some curves or all."""
    found = [line for path in paths if path.is_file() for line in read_lines(path)]
    lines = [line for line in found if "curve" in line and (not curves or line["curve"] in curves)]
    if not any("accuracy" in line for line in lines):
        raise DataError(f"there is no finished run in {' or '.join(map(str, paths))}")
    out.mkdir(parents=True, exist_ok=True)
    write(out / "overlap_curve.md", lambda path: path.write_text(markdown(lines)))
    write(out / "overlap_curve.png", partial(draw_curves, lines))
    show(lines)
    print(f"wrote overlap_curve.md and overlap_curve.png to {out}")


# ---------------------------------------------------------------------------------------------------- from start to finish


def run(args: argparse.Namespace, argv: list[str]) -> int:
    if args.report:
        if missing := [str(path) for path in args.report if not path.is_file()]:
            raise DataError(f"there is no file {' or '.join(missing)}: --report takes a grid's results.jsonl")
        report(args.report, args.curves, args.out or args.report[0].parent)
        return 0
    curves = chosen(args)
    args.out = args.out or Path("runs/overlap_curve")
    if args.jobs > 1:
        return share([*argv, "--jobs", "1"], args.jobs)
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    images = tell(load(args.data, args.data_dir, args.download))
    if not isinstance(images, Images):
        raise DataError(f"{images.name} is too large to be held in memory, as this needs it")
    if args.times:
        lines = [line for curve in curves for line in time_steps(curve, images, args.times, args.device)]
        args.out.mkdir(parents=True, exist_ok=True)
        write(
            args.out / "times.jsonl", lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        )
        for line in lines:
            print(f"{line['curve']}/{line['row']}: {line['step_ms']:.0f} ms")
        return 0
    grid = list(jobs(curves))
    with interruptible() as asked:
        for job in grid:
            with claimed(args.out / job.place) as mine:
                if mine and not asked():
                    run_job(job, images, args, asked)
            if asked():
                print("\nstopped and saved; the same command goes on", file=sys.stderr)
                return 130
    print(f"{len(gather(args.out))} runs are finished; of this grid {len(grid)} are asked for")
    report([args.out / "results.jsonl", args.out / "times.jsonl"], args.curves, args.out)
    return 0


def chosen(args: argparse.Namespace) -> tuple[Curve, ...]:
    """Of the preset, the curves, rows and seeds that were asked for; and with the settings that were asked for."""
    curves = PRESETS[args.preset]
    all_there(args.curves, [curve.name for curve in curves], f"--preset {args.preset} has no curve")
    curves = tuple(curve for curve in curves if not args.curves or curve.name in args.curves)
    whose = f"--curves {' '.join(args.curves)}" if args.curves else f"--preset {args.preset}"
    all_there(args.rows, [row for curve in curves for row in curve.rows], f"{whose} has no row")
    changes = {name: value for name in ("images", "held_out", "epochs", "batch_size") if (value := getattr(args, name))}
    return tuple(
        replace(
            curve,
            setting=replace(curve.setting, **changes),
            rows=tuple(row for row in curve.rows if not args.rows or row in args.rows),
            seeds=tuple(args.seeds or curve.seeds),
        )
        for curve in curves
    )


def all_there(asked: Sequence[str] | None, there: Sequence[str], what: str) -> None:
    """Raises `DataError` for names that are not there; it says which are, each once."""
    if unknown := [name for name in dict.fromkeys(asked or []) if name not in there]:
        raise DataError(f"{what} {', '.join(unknown)}; it has {', '.join(dict.fromkeys(there))}")


def share(argv: list[str], count: int) -> int:
    """The same command in `count` processes; each takes runs that no other has."""
    processes = [subprocess.Popen([sys.executable, __file__, *argv]) for _ in range(count)]
    with interruptible() as asked:
        while any(process.poll() is None for process in processes):
            try:
                next(process for process in processes if process.poll() is None).wait(timeout=1)
            except subprocess.TimeoutExpired:
                if asked():
                    for process in processes:
                        process.terminate()
    return max(process.returncode for process in processes)


def parser() -> Parser:
    result = Parser(
        description="Accuracy against memory as the overlap grows, from greedy to end-to-end training.",
        epilog="example: python examples/overlap_curve.py --data data/cifar10.npz --curves supervised-9 --threads 1",
    )
    add = result.add_argument
    add("--data", default="cifar10", metavar="NAME", help=f"{NAMES} (%(default)s)")
    add(
        "--data-dir", type=Path, default=Path("data"), metavar="DIR", help="where torchvision's files are (%(default)s)"
    )
    add("--download", action="store_true", help="download the data set to --data-dir if it is not there")
    add("--preset", choices=list(PRESETS), default="cpu", help="which curves, of what size (%(default)s)")
    add("--curves", nargs="+", metavar="NAME", help="only these of the preset's")
    add("--rows", nargs="+", metavar="ROW", help="only these: overlaps, start, both, upper, ...; see curves/presets.py")
    add("--seeds", nargs="+", type=at_least(0), metavar="N", help="in place of the preset's")
    add("--images", type=at_least(1), metavar="N", help="to train on, in place of the preset's")
    add("--held-out", type=at_least(1), metavar="N", help="to read out on, in place of the preset's")
    add("--epochs", type=at_least(1), metavar="N", help="in place of the preset's")
    add("--batch-size", type=at_least(2), metavar="N", help="in place of the preset's")
    add("--jobs", type=at_least(1), default=1, metavar="N", help="runs at a time (%(default)s)")
    add("--device", type=device, help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    add("--threads", type=at_least(1), metavar="N", help="of the CPU, for each run (torch's choice)")
    add("--commit", metavar="HASH", help="to be noted in the results, where this script lies outside of its repository")
    add("--times", type=at_least(1), metavar="N", help="train nothing: the time of N steps of each row, to times.jsonl")
    add("--report", type=Path, nargs="+", metavar="JSONL", help="train nothing: table and figure of these lines")
    add("--out", type=Path, metavar="DIR", help="where the runs go (runs/overlap_curve)")
    return result


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return status_of(parser(), lambda args: run(args, argv), argv, "stopped; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
