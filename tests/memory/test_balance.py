"""Cuts for a pipeline leave no rank with more to compute than any other cuts would."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest
import torch
from torch import Size, nn
from zoo import conv

from locallearn import LocalWrapper, MLPDecoder, Plan, plan_stages
from locallearn.memory import measure
from locallearn.memory.balance import balanced, stage_flops
from locallearn.memory.pieces import Piece


def piece(flops: int, decoder: int) -> Piece:
    return Piece(str(flops), Size([8]), flops, 0, 0, 0, 0, 0, 0, 0, decoder, 0)


@pytest.mark.parametrize(
    ("ranks", "overlap", "each"), [(2, 1, 2), (3, 1, 2), (2, 0, 1), (2, 2, 3), (3, 1, 1), (1, 1, 4)]
)
def test_the_busiest_rank_has_as_little_as_in_any_cuts(ranks: int, overlap: int, each: int) -> None:
    random.seed(0)
    plan = Plan.windows(ranks * each, overlap)
    for _ in range(20):
        pieces = [piece(random.randint(1, 20), random.randint(0, 9)) for _ in range(plan.stages + random.randint(0, 3))]

        def most(ends: tuple[int, ...], pieces: list[Piece] = pieces) -> float:
            costs = [stage_flops(plan, s, pieces[a:b]) for s, (a, b) in enumerate(pairwise((0, *ends)))]
            return max(sum(costs[rank * each : (rank + 1) * each]) for rank in range(ranks))

        every = [(*inner, len(pieces)) for inner in combinations(range(1, len(pieces)), plan.stages - 1)]
        assert most(balanced(pieces, plan, ranks)) == min(map(most, every))


def test_flops_of_the_ranks_add_up_to_those_of_a_step() -> None:
    net = nn.Sequential(*(nn.Sequential(conv(3 if k == 0 else 8, 8), nn.ReLU()) for k in range(16)))
    images = torch.rand(2, 4, 3, 16, 16)
    planned = plan_stages(net, images.flatten(0, 1), ranks=2, decoder=MLPDecoder)
    assert planned.ranks == (2, 2)
    assert planned.plan.stages == len(planned.stages) == 4
    model = LocalWrapper(net, planned.stages, decoder=MLPDecoder, example=images[0])
    model.local_step(*images)
    counted = measure(lambda: model.local_step(*images)).flops
    predicted = sum(stage_flops(planned.plan, s, stage) for s, stage in enumerate(planned.pieces))
    assert counted == pytest.approx(predicted, rel=0.1)  # the lowest layers' inlets need no gradient
    assert "FLOPs of a step, rank by rank: " in str(planned)


def test_what_does_not_divide_up_is_refused() -> None:
    net = nn.Sequential(*(conv(3, 3) for _ in range(5)))
    with pytest.raises(ValueError, match="each of 2 ranks gets as many stages; 5 cannot"):
        plan_stages(net, torch.rand(2, 3, 8, 8), 5, ranks=2, decoder=MLPDecoder)
    with pytest.raises(ValueError, match="goes without budget="):
        plan_stages(net, torch.rand(2, 3, 8, 8), budget=1e9, ranks=2, decoder=MLPDecoder)
    with pytest.raises(ValueError, match="6 stages need as many pieces"):
        plan_stages(net, torch.rand(2, 3, 8, 8), ranks=3, decoder=MLPDecoder)
