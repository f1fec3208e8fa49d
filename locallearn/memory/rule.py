"""Names of stages by a rule of thumb, where nothing is to be counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from torch import Tensor, nn

from locallearn._fitting.chain import Link, links
from locallearn._fitting.outlets import check_graph, example_batch
from locallearn.memory.places import places, positions, trained


def stages_of(model: nn.Module, n: int = 4, example: Tensor | Sequence[Tensor] | None = None) -> tuple[str, ...]:
    """Names for ``LocalWrapper(model, stages=...)``, by this rule.

    One forward in eval mode finds the submodules that run one after the other, each of which takes one tensor from the last
    and nothing else, up to the last map of features (what follows, a pooling and a classifier, is left out). Then:

    1. Of all modules, the one is looked for whose children return the most resolutions. If that is ``n`` or more, a stage ends
       with the last child of each of the ``n`` lowest. A resolution at which nothing is trained does not count.
    2. Else the longest run of neighbouring blocks of one class is cut into ``n`` parts, as even as can be.
    3. Else, where no such run has ``n`` blocks, all of them are.

    The first names a ResNet's ``layer1`` to ``layer4``, the second every third block of a ViT. See
    :func:`locallearn.plan_stages` for cuts that are chosen by what they cost.

    Args:
        model: the backbone; it is left as it is.
        n: how many stages.
        example: a batch that it takes; two 224-pixel RGB images by default.

    Raises:
        ValueError: if the model has fewer such blocks, or does not run on ``example``.

    Example:
        >>> from torchvision.models import resnet18
        >>> stages_of(resnet18())
        ('layer1', 'layer2', 'layer3', 'layer4')
    """
    check_graph(model)
    if n < 1:
        raise ValueError(f"a backbone has at least one stage; got n={n}")
    batch = example_batch(model, example)[:2]
    chain = links(model, batch)
    blocks = places(model, chain, len(batch))
    if len(blocks) < n:
        raise ValueError(
            f"{n} stages need as many blocks, but the model can only be cut after {[b.end for b in blocks]}"
        )
    named = max(_by_resolution(model, chain, blocks), key=len, default=[])[-n:]
    if len(named) < n:
        alike = [list(group) for _, group in groupby(blocks, lambda link: type(model.get_submodule(link.block)))]
        run = max(alike, key=len)
        named = _even([link.block for link in (run if len(run) >= n else blocks)], n)
    return tuple(named)


def _by_resolution(model: nn.Module, chain: Sequence[Link], blocks: Sequence[Link]) -> Iterator[list[str]]:
    """For every module with children that end a block, outer ones first: the last child of each resolution."""
    families: dict[str, list[tuple[Link, str]]] = {}
    for link in blocks:
        for name in _names(link):
            families.setdefault(name.rpartition(".")[0], []).append((link, name))
    for parent in sorted(families, key=lambda name: name.count(".") + (name != "")):
        family, found, before = families[parent], list[str](), 0
        if positions(blocks[-1]) != positions(family[-1][0]):
            # a pooling that belongs to the last block is a child elsewhere
            family.append((blocks[-1], blocks[-1].block))
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
