"""``locallearn stages`` and ``locallearn plan``: the planner's numbers as tables, and the line to paste."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from locallearn.command_line.backbones import Backbone, batch, load
from locallearn.command_line.drawing import draw_cuts
from locallearn.command_line.errors import CommandError, said
from locallearn.command_line.parsing import DECODERS
from locallearn.diagnosis.picture import checked
from locallearn.memory import StagePlan, plan_stages
from locallearn.memory.predict import size

Answer = tuple[str, dict[str, Any], int]  # the text, the numbers, the exit status


def stages(args: argparse.Namespace) -> Answer:
    """Every place where the backbone can be cut, and what lies below it."""
    if args.save:
        checked("--save", args.save)  # before the work
    backbone = load(args.backbone, args.size)
    example = batch(args, backbone)
    found, _ = planned(args.backbone, backbone.model, example, args.decoder, n=1, overlap=0)
    pieces = found.pieces[0]
    total = sum(piece.flops for piece in pieces) or 1
    rows = [
        {
            "ends_after": piece.end,
            "outlet": list(piece.shape),
            "parameters": piece.weights,
            "kept_bytes": piece.kept,
            "flops": piece.flops,
        }
        for piece in pieces
    ]
    width = max(12, *(len(piece.end) for piece in pieces))
    lines = [
        f"{'can be cut after':{width}} {'outlet':>22} {'parameters':>12} {'kept, MB':>9} {'GFLOP':>8} {'of all':>7}"
    ]
    lines += [
        f"{piece.end:{width}} {tuple(piece.shape)!s:>22} {piece.weights:>12,} {piece.kept / 1e6:>9,.1f} "
        f"{piece.flops / 1e9:>8,.2f} {piece.flops / total:>7.1%}"
        for piece in pieces
    ]
    kept = sum(piece.kept for piece in pieces)
    lines.append(
        f"{'together':{width}} {'':>22} {sum(piece.weights for piece in pieces):>12,} {kept / 1e6:>9,.1f} {total / 1e9:>8,.2f}"
    )
    lines.append(
        f"\nfor a batch of shape {tuple(example.shape)}: parameters, what is kept for a backward, and a forward's FLOPs, of what "
        "lies between a place and the one before"
    )
    if args.save:
        draw_cuts(args.save, args.backbone, found)
    return "\n".join(lines), {"backbone": args.backbone, "batch": list(example.shape), "places": rows}, 0


def plan(args: argparse.Namespace) -> Answer:
    """The cuts that the planner picks, what they take, and the line of code."""
    if args.save:
        checked("--save", args.save)  # before the work
    backbone = load(args.backbone, args.size)
    example = batch(args, backbone)
    found, decoder = planned(
        args.backbone,
        backbone.model,
        example,
        args.decoder,
        n=args.stages,
        overlap=args.overlap,
        budget=args.budget,
        checkpoint=args.checkpoint,
    )
    peak, whole = found.peak(checkpoint=args.checkpoint), found.peak(args.stages - 1, checkpoint=args.checkpoint)
    code = paste(backbone, found.stages, args, decoder)
    recomputed = " with blocks recomputed" if args.checkpoint else ""
    text = (
        f"{found.plan}\n\n{found}\n\n"
        f"predicted peak {size(peak)}{recomputed}, {peak / whole:.0%} of end-to-end training's {size(whole)}{recomputed}, for "
        f"a batch of shape {tuple(example.shape)}, without weights\n\n{code}"
    )
    numbers = {
        "backbone": args.backbone,
        "batch": list(example.shape),
        "stages": list(found.stages),
        "units": [{"first": unit.first, "last": unit.last, "updates": list(unit.updates)} for unit in found.plan.units],
        "decoder": decoder,
        "peak_bytes": peak,
        "end_to_end_peak_bytes": whole,
        "code": code,
    }
    if args.save:
        draw_cuts(args.save, args.backbone, found)
    return text, numbers, 0


def planned(
    name: str, model: nn.Module, example: Tensor, decoder: str | None, **settings: Any
) -> tuple[StagePlan, str]:
    """The planner's choice, with the decoder that was asked for, or with the first one that fits."""
    errors: list[Exception] = []
    for chosen in [decoder] if decoder else DECODERS:
        try:
            return plan_stages(model, example, decoder=DECODERS[chosen], **settings), chosen
        except Exception as error:  # noqa: BLE001 - the backbone's own forward may fail in any way
            errors.append(error)
    raise CommandError(f"{name}, given a batch of shape {tuple(example.shape)}: {said(errors[0])}") from errors[0]


def paste(backbone: Backbone, names: Sequence[str], args: argparse.Namespace, decoder: str) -> str:
    """``model = LocalWrapper(...)``, with what is not the default."""
    extra = "" if decoder == "conv" else f", decoder={DECODERS[decoder].__name__}"
    extra += ", checkpoint=True" if args.checkpoint else ""
    shape = (args.channels or backbone.channels, *2 * [args.size or backbone.size or 224])
    if args.tokens:
        extra += f", example=torch.zeros(2, {args.tokens}, dtype=torch.long)"
    elif shape != (3, 224, 224):
        extra += f", example=torch.zeros(2, {', '.join(map(str, shape))})"
    cuts = ", ".join(f'"{name}"' for name in names)
    return f"model = LocalWrapper({backbone.code}, stages=[{cuts}], overlap={args.overlap}{extra})"
