"""Whoever uses a weight first owns it; inlets are known only as long as they live."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from zoo import Chain

from locallearn._walk.isolation import Isolation


def fresh() -> tuple[Chain, Isolation]:
    backbone = Chain()
    return backbone, Isolation(backbone, ("a", "b", "c"))


def test_stages_with_weights_of_their_own_pass() -> None:
    backbone, isolation = fresh()
    for stage, name in enumerate("abc"):
        isolation.claim_stage(stage, list(backbone.get_submodule(name).parameters()))


def test_units_may_share_a_decoders_weights_but_not_a_stages() -> None:
    backbone, isolation = fresh()
    shared = torch.rand(2, requires_grad=True)
    isolation.claim_unit([shared])
    isolation.claim_unit([shared])
    isolation.claim_stage(0, [backbone.a.bias])
    with pytest.raises(ValueError, match=r"a decoder or a loss uses parameter 'a.bias', which stage 0"):
        isolation.claim_unit([backbone.a.bias])


def test_many_crossings_are_counted() -> None:
    backbone, isolation = fresh()
    weights = list(backbone.parameters())
    isolation.claim_stage(0, weights)
    with pytest.raises(ValueError, match=f"and {len(weights) - 3} more"):
        isolation.claim_stage(1, weights)


def test_a_tensor_that_is_no_parameter_is_named_by_its_shape() -> None:
    _, isolation = fresh()
    mask = torch.rand(2, 5, requires_grad=True)
    isolation.claim_stage(0, [mask])
    with pytest.raises(ValueError, match=r"a trainable tensor of shape \(2, 5\), which stage 0 \('a'\) uses too"):
        isolation.claim_stage(2, [mask])


def test_inlets_are_not_kept_alive() -> None:
    _, isolation = fresh()
    gc.disable()
    inlet: Tensor = torch.rand(3, requires_grad=True)
    isolation.opens(1, [inlet])
    known = weakref.ref(inlet)
    with pytest.raises(ValueError, match=r"stage 2 \('c'\) uses the outlet of stage 0 \('a'\)"):
        isolation.claim_stage(2, [inlet])
    del inlet
    gc.enable()
    assert known() is None
