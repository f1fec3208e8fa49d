"""Which parts of a backbone are recomputed: what ``checkpoint=`` says, as runs of submodules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, TypeAlias

import torch
from torch import nn

from locallearn._fitting.chain import Link, links
from locallearn._walk.recompute import Run
from locallearn._walk.replay import Learnt

Choice: TypeAlias = bool | type[nn.Module] | Callable[[nn.Module], bool]
Policy: TypeAlias = Choice | tuple[Choice, ...]


def runs(
    backbone: nn.Module, cuts: Sequence[str], policy: Policy, batch: Any, chain: Sequence[Link] | None = None
) -> dict[Run, Learnt]:
    """What is recomputed together, each run inside of one stage, outer ones first; nothing is known of them yet.

    Args:
        backbone: whose submodules are chosen from.
        cuts: the submodules after which the stages end.
        policy: ``False`` for nothing; ``True`` for every block, and every run of simple layers between two of them; a class,
            or ``module -> bool``, for every submodule that is of it, or for which it is true; a tuple for all of them.
        batch: what ``backbone`` takes.
        chain: the links of ``backbone``, if they are known.

    Raises:
        TypeError: for another policy.
        ValueError: if a stage ends inside of what would be recomputed, or if nothing would be.
    """
    found: dict[Run, None] = {}
    for choice in policy if isinstance(policy, tuple) else (policy,):
        if isinstance(choice, bool):
            chosen = natural(backbone, cuts, chain or links(backbone, batch)) if choice else []
        elif callable(choice):
            wanted = partial(_is_a, choice) if isinstance(choice, type) else choice
            chosen = [(name,) for name, module in backbone.named_modules() if name and wanted(module)]
        else:
            raise TypeError(
                "checkpoint is True, a class of modules such as checkpoint=Bottleneck, a callable `module -> bool`, or a tuple "
                f"of them; got {policy!r}"
            )
        found |= dict.fromkeys(chosen)
    if not found and not isinstance(policy, bool):
        made_of = sorted({type(module).__name__ for module in backbone.modules()})
        raise ValueError(
            f"checkpoint={policy!r} chooses no submodule of {type(backbone).__name__}; it is made of {made_of}"
        )
    torn = {run[0]: [cut for cut in cuts if cut.startswith(f"{run[0]}.")] for run in found}
    if torn := {name: ends for name, ends in torn.items() if ends}:
        raise ValueError(
            f"checkpoint= recomputes modules inside of which stages end: {torn}. Choose smaller parts, or move the cuts"
        )
    return {run: Learnt() for run in apart(found) if not _scripted(backbone, run)}


def _scripted(backbone: nn.Module, run: Run) -> bool:
    """Whether something in it went through ``torch.jit``: its buffers cannot be told apart from outside, nor swapped."""
    parts = (part for name in run for part in backbone.get_submodule(name).modules())
    return any(isinstance(part, torch.jit.ScriptModule) for part in parts)


def _is_a(kind: type[nn.Module], module: nn.Module) -> bool:
    return isinstance(module, kind)


def natural(backbone: nn.Module, cuts: Sequence[str], chain: Sequence[Link]) -> list[Run]:
    """Every block with submodules by itself; simple layers together with the convolution or linear layer before them.

    A block that ends with operations of its own, as in ``norm(x).sigmoid()``, is one as well, unless blocks lie inside of it.
    """
    torn = {name for name, _ in backbone.named_modules() for cut in cuts if cut != name and _within(cut, name)}
    has_parts = {link.block: any(backbone.get_submodule(link.block).children()) for link in chain}
    whole = [name for name, inner in has_parts.items() if inner and name not in torn]
    blocks = [name for name in whole if not any(_inside(other, name) for other in whole)]
    found: list[Run] = [()]
    for link in chain:
        if any(_inside(link.block, block) for block in blocks):
            continue
        module = backbone.get_submodule(link.block)
        starts = has_parts[link.block] or any(weight.ndim > 1 for weight in module.parameters(recurse=False))
        if starts or not link.follows or not (found[-1] and _joinable(backbone, found[-1][-1], link.block)):
            found.append(())
        if starts or found[-1]:
            found[-1] = (*found[-1], link.block)
        if has_parts[link.block] or any(_within(link.block, cut) and _within(cut, link.end) for cut in cuts):
            found.append(())
    return [run for run in found if len(run) > 1 or (run and run[0] in blocks)]


def _joinable(backbone: nn.Module, below: str, above: str) -> bool:
    """Whether between two submodules only the boundaries of plain ``nn.Sequential``s are crossed, which do nothing there."""
    return all(
        type(module).forward is nn.Sequential.forward and "forward" not in module.__dict__
        for name in {*_outer(below)} ^ {*_outer(above)}
        for module in [backbone.get_submodule(name)]
    )


def _outer(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name


def apart(found: Iterable[Run]) -> list[Run]:
    """``found``, with each run cut where another recomputed module begins or ends, outer runs first.

    Example:
        >>> apart([("conv", "block.norm"), ("block",)])
        [('block',)]
    """
    runs = list(dict.fromkeys(found))
    joined = {name for run in runs if len(run) > 1 for name in run}
    alone = [run[0] for run in runs if len(run) == 1]
    result: dict[Run, None] = {}
    for run in runs:
        if len(run) == 1 and run[0] in joined:
            continue  # it runs again as a part of the others
        for _, names in groupby(run, key=lambda name: [outer for outer in alone if _inside(name, outer)]):
            piece = tuple(names)
            if len(piece) > 1 or len(run) == 1:
                result[piece] = None
    return sorted(result, key=lambda run: run[0].count("."))


def _within(name: str, outer: str) -> bool:
    return name == outer or _inside(name, outer)


def _inside(name: str, outer: str) -> bool:
    return name.startswith(f"{outer}.")
