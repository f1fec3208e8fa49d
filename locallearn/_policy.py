"""Which parts of a backbone are recomputed: what ``checkpoint=`` says, as runs of submodules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from torch import Tensor, nn

from locallearn._chain import Link, links
from locallearn._recompute import Run

Choice: TypeAlias = bool | type[nn.Module] | Callable[[nn.Module], bool]
Policy: TypeAlias = Choice | tuple[Choice, ...]


def runs(backbone: nn.Module, cuts: Sequence[str], policy: Policy, batch: Tensor) -> tuple[Run, ...]:
    """What is recomputed together, each run inside of one stage, outer ones before those inside of them.

    Args:
        backbone: whose submodules are chosen from.
        cuts: the submodules after which the stages end.
        policy: ``False`` for nothing; ``True`` for every block, and every run of simple layers between two of them; a class,
            or ``module -> bool``, for every submodule that is of it, or for which it is true; a tuple for all of them.
        batch: what ``backbone`` takes.

    Raises:
        TypeError: for another policy.
        ValueError: if a stage ends inside of what would be recomputed, or if nothing would be.
    """
    found: dict[Run, None] = {}
    for choice in policy if isinstance(policy, tuple) else (policy,):
        if isinstance(choice, bool):
            chosen = natural(backbone, cuts, links(backbone, batch)) if choice else []
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
    return tuple(sorted(found, key=lambda run: run[0].count(".")))


def _is_a(kind: type[nn.Module], module: nn.Module) -> bool:
    return isinstance(module, kind)


def natural(backbone: nn.Module, cuts: Sequence[str], chain: Sequence[Link]) -> list[Run]:
    """Every block with submodules by itself; simple layers together with the convolution or linear layer before them."""
    found: list[Run] = [()]
    for link in chain:
        module = backbone.get_submodule(link.block)
        block = any(module.children())
        starts = block or any(weight.ndim > 1 for weight in module.parameters(recurse=False))
        if starts or not link.follows:
            found.append(())
        if starts or found[-1]:
            found[-1] = (*found[-1], link.block)
        if block or any(_within(link.block, cut) and _within(cut, link.end) for cut in cuts):
            found.append(())
    torn = {name for name, _ in backbone.named_modules() for cut in cuts if cut != name and _within(cut, name)}
    return [
        run
        for run in found
        if len(run) > 1 or (run and run[0] not in torn and any(backbone.get_submodule(run[0]).children()))
    ]


def _within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")
