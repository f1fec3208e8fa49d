"""Where the stages of a backbone may end, of all the places at which it can be cut."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from locallearn._fitting.chain import Link
from locallearn._fitting.channels import channel_axis
from locallearn._fitting.outlets import batch_first
from locallearn._fitting.recomputed import natural
from locallearn._walk.recompute import Run


def places(model: nn.Module, chain: Sequence[Link], rows: int | None, whole: Collection[Run] = ()) -> list[Link]:
    """Those after a block or a run of simple layers, up to the last map of features.

    What follows that map, a pooling and a classifier, is left out. Vectors (``(N, C)``) are no map; where there are only
    such, nothing is left out. Where no map has more than one position, the last one counts.

    Args:
        model: the backbone.
        chain: its links, for a batch of ``rows``.
        rows: how many.
        whole: what is recomputed, and so takes no end inside of it.
    """
    together = natural(model, (), chain)
    inside = {name for run in together for name in run[:-1]}
    outer = [run[0] for run in (*together, *whole) if len(run) == 1]
    cuttable = [
        link
        for link in chain
        if batch_first(link.outlet.shape, rows) and not any(link.end.startswith(f"{name}.") for name in outer)
    ]
    maps = [link for link in cuttable if positions(link) > 1]
    maps = maps or [link for link in cuttable if len(link.outlet.shape) > 2]  # of tiny inputs
    if not maps:
        return [link for link in cuttable if link.block not in inside]
    last = _last(model, maps[-1], cuttable, together)
    body = cuttable[: cuttable.index(last)]
    return [*(link for link in body if link.block not in inside), last]  # a run may go on with the pooling


def _last(model: nn.Module, last: Link, cuttable: Sequence[Link], together: Sequence[Run]) -> Link:
    """The last map, or what layers with weights have made of it, in place of a pooling.

    If the inputs are small, the last blocks see a single position, as ResNet-18's ``layer4`` does at 32 pixels.
    """
    shrunk = False
    for link in cuttable[cuttable.index(last) + 1 :]:
        learns = trained(model, link) > 0
        if len(link.outlet.shape) <= 2 or not (shrunk or learns):
            break
        shrunk = True
        if learns or any(last.block in run and link.block in run for run in together):
            last = link
    return last


def trained(model: nn.Module, link: Link) -> int:
    """How many numbers are trained in a link's block."""
    return sum(weight.numel() for weight in model.get_submodule(link.block).parameters() if weight.requires_grad)


def positions(link: Link) -> int:
    """Of a feature map, or tokens: all that is neither batch nor channels; 1 for vectors."""
    shape = link.outlet.shape
    return shape[1:].numel() // shape[link.axis or channel_axis(shape)]
