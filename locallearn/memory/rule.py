"""Names of stages by a rule of thumb, where nothing is to be counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from torch import nn

from locallearn._fitting.batches import View, example_batch, rows
from locallearn._fitting.chain import Link, links
from locallearn._fitting.features import Features
from locallearn._fitting.outlets import check_graph
from locallearn.memory.places import places, positions, trained
from locallearn.plan import whole


def stages_of(model: nn.Module, n: int = 4, example: View | Sequence[View] | None = None) -> tuple[str, ...]:
    """Names for ``LocalWrapper(model, stages=...)``, by this rule.

    One forward in eval mode finds the submodules that run one after the other, each of which takes what the last returns
    and nothing else, up to the last map of features (what follows, a pooling and a classifier, is left out). Then:

    1. Of all modules, the one is looked for whose children return the most resolutions. If that is ``n`` or more, a stage ends
       with the last child of each of the ``n`` lowest. A resolution at which nothing is trained does not count.
    2. Else the longest run of neighbouring children of one class is cut into ``n`` parts, as even as can be.
    3. Else, where no such run is as long as ``n``, the longest run of blocks of one class is, or else all blocks are.

    The first names a ResNet's ``layer1`` to ``layer4``, the second every third block of a ViT. See
    :func:`locallearn.plan_stages` for cuts that are chosen by what they cost.

    Args:
        model: the backbone; it is left as it is.
        n: how many stages.
        example: a batch that it takes; two 224-pixel RGB images by default.

    Raises:
        TypeError: if ``n`` is no whole number.
        ValueError: if the model has fewer such blocks, or does not run on ``example``.

    Example:
        >>> from torchvision.models import resnet18
        >>> stages_of(resnet18())
        ('layer1', 'layer2', 'layer3', 'layer4')
    """
    check_graph(model)
    n = whole("n, the number of stages,", n, 1)
    batch = example_batch(model, example)
    chain = links(model, batch, features=Features())
    blocks = places(model, chain, rows(batch))
    if len(blocks) < n:
        raise ValueError(
            f"{n} stages need as many blocks, but the model can only be cut after {[b.end for b in blocks]}"
        )
    families = _families(blocks)
    named = max(_by_resolution(model, chain, families, blocks[-1]), key=len, default=[])[-n:]
    if len(named) < n:
        flat = [link.block for link in blocks]
        children = max((_alike(model, [name for _, name in family]) for family in families), key=len)
        named = _even(next(run for run in (children, _alike(model, flat), flat) if len(run) >= n), n)
    return tuple(named)


def _alike(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The longest run of neighbours of one class."""
    return max((list(run) for _, run in groupby(names, lambda name: type(model.get_submodule(name)))), key=len)


def _families(blocks: Sequence[Link]) -> list[list[tuple[Link, str]]]:
    """For every module with children that end a block, outer ones first: these children."""
    families: dict[str, list[tuple[Link, str]]] = {}
    for link in blocks:
        for name in _names(link):
            families.setdefault(name.rpartition(".")[0], []).append((link, name))
    return [families[parent] for parent in sorted(families, key=lambda name: name.count(".") + (name != ""))]


def _by_resolution(
    model: nn.Module, chain: Sequence[Link], families: Sequence[list[tuple[Link, str]]], top: Link
) -> Iterator[list[str]]:
    """For every family: the last child of each resolution, if something is trained there."""
    for children in families:
        family, found, before = list(children), list[str](), 0
        if positions(top) != positions(family[-1][0]):  # a pooling that belongs to the last block is a child elsewhere
            family.append((top, top.block))
        for _, group in groupby(family, lambda child: positions(child[0])):
            *_, (last, name) = group
            until = chain.index(last) + 1
            if any(trained(model, link) for link in chain[before:until]):
                found.append(name)
            before = until
        yield found


def _names(link: Link) -> list[str]:
    """All submodules that return its outlet, from the outermost to the block."""
    steps = link.block.split(".")
    return [".".join(steps[: k + 1]) for k in range(link.end.count("."), len(steps))]


def _even(run: Sequence[str], n: int) -> list[str]:
    return [run[(k + 1) * len(run) // n - 1] for k in range(n)]
