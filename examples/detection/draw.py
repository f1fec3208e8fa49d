"""Figure 4: what the detectors find in images, `python examples/detection/draw.py runs/det-loco --data data/coco`.

A row per image; the ground truth on the left, then each run that is named, such as SimCLR, Greedy InfoMax and LoCo side by
side. A class has the same colour everywhere; where there is but one, its objects differ. Writes a PNG to `--out`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import stoppable

import numpy as np
import torch
from command_line import Parser, at_least, device, number_from, status_of, write
from drawing.figure_style import INK, STYLE
from inputs.images import DataError
from instances import InstanceSet, Photo, boxes_of, labels_of, masks_of
from matplotlib import colormaps, patheffects, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from precision import detections
from saved import load_detector
from sets import add_data_arguments, load_part
from torch import Tensor

INCHES = 3.4  # a panel's width
TALLEST = 0.8  # of its width, a panel's height
VEIL = 0.45  # of a mask's colour over the image
PALETTE = [colour for name in ("tab10", "Dark2", "Set1") for colour in colormaps[name].colors]


class Drawn(NamedTuple):
    """Objects to draw in an image: `(N, 4)`, `(N,)`, `(N, H, W)`, and scores `(N,)` if they are predicted."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor
    scores: Tensor | None = None


def truth(photo: Photo) -> Drawn:
    instances = photo.told_apart
    return Drawn(boxes_of(instances), labels_of(instances), masks_of(instances, photo).bool())


def predicted(found: dict[str, Tensor], threshold: float, most: int) -> Drawn:
    """The `most` detections with the highest scores of those above the threshold."""
    keep = found["scores"].argsort(descending=True)[:most]
    keep = keep[found["scores"][keep] >= threshold]
    return Drawn(found["boxes"][keep], found["labels"][keep], found["masks"][keep], found["scores"][keep])


def draw(
    rows: Sequence[tuple[Tensor, Sequence[Drawn]]], headings: Sequence[str], classes: Sequence[str], path: Path
) -> None:
    """`rows`: an image, uint8 `(3, H, W)`, and what to draw in it, a panel for each of `headings`."""
    heights = [min(TALLEST, image.shape[1] / image.shape[2]) for image, _ in rows]
    with rc_context(STYLE):
        figure = Figure(figsize=(INCHES * len(headings), INCHES * sum(heights) + 0.4), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
        panels = figure.subplots(len(rows), len(headings), squeeze=False, height_ratios=heights)
        for row, (image, drawn) in zip(panels, rows, strict=True):
            for panel, objects in zip(row, drawn, strict=True):
                fill(panel, image, objects, classes)
        for panel, heading in zip(panels[0], headings, strict=True):
            panel.set_title(heading)
        write(path, lambda unfinished: figure.savefig(unfinished, format="png", dpi=160))


def fill(panel: Axes, image: Tensor, drawn: Drawn, classes: Sequence[str]) -> None:
    original = image.permute(1, 2, 0).numpy() / 255  # (H, W, 3)
    pixels = original.copy()
    order = drawn.masks.flatten(1).sum(dim=1).argsort(descending=True).tolist()  # small ones in front
    colours = [PALETTE[(int(drawn.labels[k]) - 1 if len(classes) > 1 else k) % len(PALETTE)] for k in range(len(order))]
    for k in order:
        mask = drawn.masks[k].numpy()
        pixels[mask] = (1 - VEIL) * original[mask] + VEIL * np.array(colours[k])
    panel.imshow(pixels, interpolation="lanczos")
    for k in order:
        mask = drawn.masks[k].numpy()
        x1, y1, x2, y2 = drawn.boxes[k].tolist()
        if mask.any() and not mask.all():
            panel.contour(mask.astype(float), levels=[0.5], colors=[colours[k]], linewidths=0.8)
        panel.add_patch(
            Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=colours[k], linewidth=0.8)
        )
        text = classes[int(drawn.labels[k]) - 1]
        if drawn.scores is not None:
            text += f" {100 * drawn.scores[k]:.0f}"
        name(panel, text, x1, y1, colours[k], image)
    panel.set(xlim=(-0.5, image.shape[2] - 0.5), ylim=(image.shape[1] - 0.5, -0.5))
    panel.set_axis_off()


def name(panel: Axes, text: str, x: float, y: float, colour: tuple[float, ...], image: Tensor) -> None:
    """Above the box's upper left corner; within it where the image ends."""
    below = y < 0.06 * image.shape[1]
    label = panel.text(
        min(max(x, 0), 0.9 * image.shape[2]),
        y,
        text,
        fontsize=6,
        color="white",
        va="top" if below else "bottom",
        bbox={"boxstyle": "square,pad=0.15", "facecolor": colour, "edgecolor": "none", "alpha": 0.8},
        clip_on=True,
    )
    label.set_path_effects([patheffects.withStroke(linewidth=0.6, foreground=INK)])


def chosen(found: InstanceSet, names: Sequence[str] | None, count: int) -> list[Photo]:
    """The named images, by id or file name; otherwise `count` ones with two to eight objects, spread over the set."""
    if names:
        known = {key: photo for photo in found.photos for key in (str(photo.id), photo.path.name)}
        if missing := [wanted for wanted in names if wanted not in known]:
            raise DataError(f"{found.name} has no image {missing[0]!r}: give ids or file names")
        return [known[wanted] for wanted in names]
    clear = [photo for photo in found.photos if 2 <= len(photo.told_apart) <= 8]
    clear = clear or [photo for photo in found.photos if photo.told_apart]
    return clear[:: max(1, len(clear) // count)][:count]


def run(args: argparse.Namespace) -> None:
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    named = [(heading, Path(path)) for heading, _, path in (run.rpartition("=") for run in args.runs)]
    detectors = [load_detector(path, args.device) for _, path in named]
    args.merge = detectors[0][1]["merge"]
    found = load_part(args, "val")
    photos = chosen(found, args.images, args.count)
    images = [photo.read() for photo in photos]
    columns, headings = [[truth(photo) for photo in photos]], ["ground truth"]
    for (heading, path), (model, settings) in zip(named, detectors, strict=True):
        if settings["classes"] != list(found.classes):
            raise DataError(
                f"{path} detects {_some(settings['classes'])}, but {found.name} has {_some(found.classes)}: draw runs of the "
                "same --data and --merge together"
            )
        with torch.no_grad():
            seen = [detections(model, image.to(args.device).float() / 255) for image in images]
        columns.append([predicted(each, args.threshold, args.most) for each in seen])
        headings.append(heading or settings["backbone"])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(list(zip(images, zip(*columns, strict=True), strict=True)), headings, found.classes, args.out)
    print(f"wrote {args.out}")


def _some(classes: Sequence[str]) -> str:
    names = ", ".join([*classes[:3], *(["..."] if len(classes) > 3 else [])])
    return f"{len(classes)} class{'es' * (len(classes) > 1)} ({names})"


def parser() -> Parser:
    result = Parser(
        description="Draw what detectors find beside the ground truth.",
        epilog="example: python examples/detection/draw.py SimCLR=runs/det-simclr LoCo=runs/det-loco --data data/coco",
    )
    add = result.add_argument
    add("runs", nargs="+", metavar="RUN", help="directories of train.py, or HEADING=DIRECTORY")
    add_data_arguments(result, trained=True)
    add("--images", nargs="+", metavar="IMAGE", help="ids or file names (some with two to eight objects)")
    add("--count", type=at_least(1), default=4, metavar="N", help="images, where none are named (%(default)s)")
    add("--threshold", type=number_from(0), default=0.5, metavar="P", help="least score to draw (%(default)s)")
    add("--most", type=at_least(1), default=20, metavar="N", help="detections drawn in an image (%(default)s)")
    add("--device", type=device, help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    add("--threads", type=at_least(1), metavar="N", help="of the CPU (torch's choice)")
    add("--out", type=Path, default=Path("runs/detections.png"), metavar="PNG", help="(%(default)s)")
    return result


def main(argv: list[str] | None = None) -> int:
    return status_of(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
