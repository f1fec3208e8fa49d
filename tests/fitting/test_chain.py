"""Where a backbone can be cut, also where functions of Python's make the outlets."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn

from locallearn._fitting.chain import links


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(self.linear(x))


def test_the_graph_of_pythons_own_functions_lives_as_long_as_the_links() -> None:
    """Their nodes do not keep it alive, and older torch reads freed memory then."""
    found = links(nn.Sequential(Block(), Block(), Block()), torch.zeros(2, 4))
    gc.collect()
    assert [link.end for link in found] == ["0.linear", "0", "1.linear", "1", "2.linear", "2"]
    numbers = [place.node._sequence_nr() for link in found for place in link.places]
    assert numbers == sorted(set(numbers))
