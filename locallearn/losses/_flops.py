"""How many floating-point operations the operators take, for torch's flop counter; imported by whoever counts."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from locallearn.losses import _positives, _tiles

assert _positives  # importing it defines its operators

_ops = torch.ops.locallearn


def _product(at: _tiles.Tile, blocks: Sequence[Tensor]) -> int:
    rows = min(at.rows.stop, blocks[at.u].shape[0]) - at.rows.start
    columns = min(at.columns.stop, blocks[at.v].shape[0]) - at.columns.start
    flops: int = 2 * rows * columns * blocks[at.u].shape[1]
    return flops


def _similarities(blocks: Sequence[Tensor], looks: Sequence[int], tile: int) -> int:
    """One product per tile."""
    return sum(_product(at, blocks) for at in _tiles.tiles(blocks, looks, tile))


@register_flop_formula(_ops.negatives, get_raw=True)
def _negatives(blocks: Any, labels: Any, looks: Any, twins: Any, bounded: Any, tile: int, *rest: Any, **_: Any) -> int:
    return _similarities(blocks, looks, tile)


@register_flop_formula(_ops.positives, get_raw=True)
def _positives_of_labels(blocks: Any, labels: Any, looks: Any, tile: int, *rest: Any, **_: Any) -> int:
    return _similarities(blocks, looks, tile)


def _gradients(blocks: Sequence[Tensor], looks: Sequence[int], tile: int, wanted: int) -> int:
    """The tile again, and one product for each of its sides that moves."""
    visited = [at for at in _tiles.tiles(blocks, looks, tile) if at.u < wanted]
    return sum(_product(at, blocks) * (2 + (at.v < wanted and not at.on_diagonal)) for at in visited)


@register_flop_formula(_ops.negatives_backward, get_raw=True)
def _negatives_backward(
    blocks: Any, labels: Any, looks: Any, twins: Any, bounded: Any, tile: int, *rest: Any, **_: Any
) -> int:
    return _gradients(blocks, looks, tile, wanted=rest[-1])


@register_flop_formula(_ops.positives_backward, get_raw=True)
def _positives_backward(blocks: Any, labels: Any, looks: Any, tile: int, *rest: Any, **_: Any) -> int:
    return _gradients(blocks, looks, tile, wanted=rest[-1])


_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
if _linear is not None and _linear not in flop_registry:

    @register_flop_formula(_linear)
    def _linear_pointwise(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
        """By which single precision is multiplied on CPUs, also where no operator of ours hides it."""
        return 2 * math.prod(a) * b[0]
