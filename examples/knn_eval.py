"""Read out a frozen encoder by its nearest neighbours, stage by stage: `python examples/knn_eval.py runs/loco`.

A vote of the k training images nearest in angle, each with weight exp(cos / 0.07), for k = 20 and 200 (Wu et al. 2018,
section 3.4), or of all images where there are fewer. Writes knn_eval-DATA.json to the run's directory, with -CHECKPOINT before
.json where RUN is one; older results of that name stay as .json.1 and so on.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import stoppable

from command_line import Parser, at_least, status_of
from reading.encoders import about, add_arguments, chosen, vectors
from reading.evaluate import knn
from reading.readout import file_name, save, show
from tqdm import tqdm

TEMPERATURE = 0.07


def parser() -> Parser:
    result = Parser(
        description="Read out a frozen encoder by its nearest neighbours, stage by stage.",
        epilog="example: python examples/knn_eval.py runs/digits-presnet_small-loco --k 20",
    )
    add_arguments(result)
    add = result.add_argument
    add(
        "--k",
        type=at_least(1),
        nargs="+",
        default=[20, 200],
        metavar="K",
        help="neighbours that vote, as many as there are at most (20 200)",
    )
    add(
        "--per-stage", action=argparse.BooleanOptionalAction, default=True, help="all stages, or the top one only (all)"
    )
    return result


def run(args: argparse.Namespace) -> None:
    encoder, images = chosen(args)
    if not args.per_stage:
        encoder = replace(encoder, stages=encoder.stages[-1:])
    train, train_labels = vectors(args, encoder, images, "train")
    test, test_labels = vectors(args, encoder, images, "test")
    labels = train_labels.to(args.device), test_labels.to(args.device)
    used = list(dict.fromkeys(min(k, len(train_labels)) for k in args.k))
    if used != args.k:
        print(f"k = {', '.join(map(str, used))}: there are {len(train_labels)} training images")
    accuracy: dict[int, list[float]] = {k: [] for k in used}
    for known, held_out in tqdm(
        zip(train, test, strict=True), total=len(train), desc="votes", unit="stage", leave=False
    ):
        data = known.to(args.device), labels[0], held_out.to(args.device), labels[1]
        for k, found in accuracy.items():
            found.append(knn(*data, k=k, temperature=TEMPERATURE))
    results = {
        "k": used,
        "temperature": TEMPERATURE,
        "stages": list(encoder.stages),
        "accuracy": {str(k): found for k, found in accuracy.items()},
        **about(args, encoder, images),
    }
    path = encoder.directory / file_name("knn_eval", images.name, encoder.checkpoint)
    columns = {f"k = {k}, %": found for k, found in accuracy.items()}
    show(f"{encoder.name} on {images.name}: nearest neighbours", encoder.stages, columns, images)
    save(path, results)


def main(argv: list[str] | None = None) -> int:
    return status_of(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
