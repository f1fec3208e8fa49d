"""What local learning does, looked at from outside: `python examples/diagnose.py`, the pictures of docs/diagnosis.md.

Trains the quickstart's small network on scikit-learn's digits with several overlaps, and once with a unit whose loss lets it
collapse; then asks `locallearn.diagnosis` of each what it has to say. Takes two minutes on a free core.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import stoppable

import torch
from command_line import Parser, at_least, status_of
from inputs.images import load
from inputs.views import grey_views, scaled
from quickstart import LEARNING_RATE, STAGES, SmallResNet
from torch import Tensor
from tqdm import trange

from locallearn import ConvMLPDecoder, InfoNCE, LocalWrapper
from locallearn.diagnosis import Monitor, gradient_agreement, linear_cka, stage_quality

OVERLAPS = {"overlap 0": 0, "overlap 1": 1, "overlap 2": 2, "end-to-end": len(STAGES) - 1}
PROBED = ("overlap 0", "overlap 1", "end-to-end")
BATCH = 128


def attraction(one: Tensor, other: Tensor) -> Tensor:
    """A loss that views of an image agree, and nothing else: it is least in a collapse."""
    return (one - other).square().mean()


def new_decoder(width: int) -> ConvMLPDecoder:
    """The same for a width, however many decoders were made before."""
    torch.manual_seed(0)
    return ConvMLPDecoder(width)


def wrapped(overlap: int, broken: int | None = None) -> LocalWrapper:
    torch.manual_seed(0)
    units = len(STAGES) - overlap
    losses = [attraction if unit == broken else InfoNCE() for unit in range(units)]
    example = torch.zeros(2, 1, 8, 8)
    return LocalWrapper(SmallResNet(), STAGES, overlap, new_decoder, loss=losses, example=example)


def train(model: LocalWrapper, images: Tensor, steps: int, every: int, name: str) -> Monitor:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    monitor = Monitor(model, every, settle=50, warn=lambda line: print(f"{name}: warning: {line}"))
    torch.manual_seed(1)
    for _ in trange(steps, desc=name, leave=False):
        batch = images[torch.randint(len(images), (BATCH,))]
        model.local_step(grey_views(batch), grey_views(batch))
        optimizer.step()
        optimizer.zero_grad()
        if monitor.due:
            monitor.read()
    monitor.close()
    return monitor


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    digits = load("digits")
    args.out.mkdir(parents=True, exist_ok=True)
    every = max(1, args.steps // 40)
    models, monitors = {}, {}
    for name, overlap in OVERLAPS.items():
        models[name] = wrapped(overlap)
        monitors[name] = train(models[name], digits.train, args.steps, every, name)
    monitors["overlap 1"].save(args.out / "units.png")
    train(wrapped(1, broken=2), digits.train, args.steps, every, "a broken unit").save(args.out / "collapse.png")

    torch.manual_seed(2)
    views = [grey_views(digits.train[:512]) for _ in range(2)]
    reports = {name: gradient_agreement(model, *views) for name, model in models.items() if name != "end-to-end"}
    print(f"\n{reports['overlap 1']}\n")
    for name, report in reports.items():
        print(f"{name}: cosines by stage", *(f"{stage.whole.cosine:.2f}" for stage in report.stages))
    reports["overlap 1"].save(args.out / "agreement.png")
    reports["overlap 0"].save(args.out / "overlaps.png", beside=reports)

    known, held_out = (
        (scaled(pixels), labels)
        for pixels, labels in ((digits.train, digits.train_labels), (digits.test, digits.test_labels))
    )
    batches = [list(zip(*(part.split(256) for part in both), strict=True)) for both in (known, held_out)]
    for name in PROBED:
        quality = stage_quality(models[name], *batches, augment=lambda x: grey_views((x + 1) * 127.5))
        print(f"\n{name}\n{quality}")
        if name == "overlap 1":
            quality.save(args.out / "quality.png")
    alike = linear_cka(models["overlap 1"], models["end-to-end"], batches[1])
    print(f"\noverlap 1 against end-to-end\n{alike}")
    alike.save(args.out / "cka.png", names=("LoCo", "end-to-end"))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Draw what locallearn.diagnosis has to say of runs on the digits.")
    parser.add_argument("--steps", type=at_least(1), default=280, help="of each run (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/diagnose"), help="where pictures go (%(default)s)")
    return status_of(parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
