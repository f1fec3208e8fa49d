"""``locallearn check``: every gradient of a local pass beside plain autograd's, parameter by parameter."""

from __future__ import annotations

import argparse
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from locallearn.command_line.backbones import Backbone, batch, load
from locallearn.command_line.cutting import Answer, planned
from locallearn.command_line.errors import CommandError, nearest, said
from locallearn.command_line.parsing import DECODERS
from locallearn.testing.comparison import ENTRIES, RTOL, problems, relative_errors
from locallearn.testing.copies import copied, gradients, replayed
from locallearn.testing.reference import prepared
from locallearn.wrapper import LocalWrapper

_MOST = 20  # parameters that are shown


def check(args: argparse.Namespace) -> Answer:
    """The largest relative error of each parameter's gradient, by both ways to train; status 1 if one is too large."""
    if args.views < 2:
        raise CommandError(f"InfoNCE compares views: --views is at least 2; got {args.views}")
    if args.batch < 2:
        raise CommandError(
            f"InfoNCE's negatives are the other inputs of a batch: --batch is at least 2; got {args.batch}"
        )
    torch.manual_seed(args.seed)
    backbone = load(args.backbone, args.size)
    model = _wrapped(args, backbone)
    views = [_random(batch(args, backbone), model) for _ in range(args.views)]
    ready = prepared(model, tuple(views), None)
    expected, rtol = ready.expected, RTOL[ready.expected.dtype]
    if not expected.gradients:
        raise CommandError(f"there is nothing to compare: no unit trains any weight of {args.backbone}")
    ours: dict[str, dict[str, Tensor]] = {}
    wrong: list[str] = []
    for entry, run in ENTRIES.items():
        with replayed():
            again = copied(ready.model)
            run(again, deepcopy(ready.views), None)
        ours[entry] = gradients(again)
        wrong += [f"{entry}: {problem}" for problem in problems(again, expected, rtol)]

    errors = {entry: relative_errors(found, expected) for entry, found in ours.items()}
    rows = []
    for name, gradient in expected.gradients.items():
        norm, off = float(gradient.norm()), {entry: found[name] for entry, found in errors.items()}
        units = expected.trained_by.get(name, ())
        rows.append(
            {"name": name, "stage": expected.stages.get(name), "units": list(units), "norm": norm, "errors": off}
        )
    numbers = {
        "backbone": args.backbone,
        "stages": list(model.stages),
        "dtype": str(expected.dtype).removeprefix("torch."),
        "rtol": rtol,
        "ok": not wrong,
        "losses": expected.losses.tolist(),
        "parameters": rows,
        "problems": wrong,
    }
    return _text(args, model, numbers, rows), numbers, 1 if wrong else 0


def _wrapped(args: argparse.Namespace, backbone: Backbone) -> LocalWrapper:
    example = batch(args, backbone)
    if args.at:
        known = [name for name, _ in backbone.model.named_modules() if name]
        if unknown := [name for name in args.at if name not in known]:
            advice = "".join(nearest(name, known) for name in unknown[:1])
            raise CommandError(f"{args.backbone} has no submodules {unknown}{advice}")
        names, decoder = args.at, args.decoder
    else:
        found, decoder = planned(
            args.backbone, backbone.model, example, args.decoder, n=args.stages or 4, overlap=args.overlap
        )
        names = list(found.stages)
    errors: list[Exception] = []
    for chosen in [decoder] if decoder else DECODERS:
        try:
            return LocalWrapper(
                backbone.model,
                names,
                args.overlap,
                DECODERS[chosen],
                checkpoint=args.checkpoint,
                example=example[:2],
            )
        except (ValueError, TypeError) as error:
            errors.append(error)
    raise CommandError(f"{args.backbone} cannot be wrapped so: {said(errors[0])}") from errors[0]


def _random(example: Tensor, model: LocalWrapper) -> Tensor:
    if example.is_floating_point():
        return torch.rand_like(example)
    tables = [part.num_embeddings for part in model.backbone.modules() if isinstance(part, torch.nn.Embedding)]
    known = getattr(getattr(model.backbone, "config", None), "vocab_size", min(tables, default=2))
    return torch.randint(known, example.shape)


def _text(args: argparse.Namespace, model: LocalWrapper, numbers: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    shown = sorted(rows, key=lambda row: -max(row["errors"].values()))[: None if args.all else _MOST]
    width = max(len(row["name"]) for row in shown)
    lines = [
        str(model.plan),
        "",
        f"{'gradient of':{width}} {'stage':>5} {'units':>7} {'norm':>10} {'relative error':>15}",
    ]
    for row in shown:
        stage = "" if row["stage"] is None else str(row["stage"])
        units = ", ".join(map(str, row["units"]))
        lines.append(
            f"{row['name']:{width}} {stage:>5} {units:>7} {row['norm']:>10.3g} {max(row['errors'].values()):>15.2g}"
        )
    if len(rows) > len(shown):
        lines.append(f"and {len(rows) - len(shown)} more, with smaller errors (--all shows them)")
    lines.append("")
    if numbers["problems"]:
        lines += [
            "NOT the gradients of one plain backward per unit:",
            *(f"  {line}" for line in numbers["problems"][:_MOST]),
        ]
    else:
        lines.append(
            f"all {len(rows)} gradients are those of one plain backward per unit, by local_step and by loss.backward(), to "
            f"{max(max(row['errors'].values()) for row in rows):.1g} in {numbers['dtype']} (allowed: {numbers['rtol']:g})"
        )
    return "\n".join(lines)
