"""Families whose blocks return more than a tensor, or take more than one: wrapped as they are, and right.

Those that share weights or activations between stages are refused, and the way out that the message names works.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from locallearn import LocalWrapper, TokenDecoder
from locallearn.testing import assert_local_gradients

pytest.importorskip("timm", reason="the extra `examples` has timm")
from works.families import (
    ATTENTION,
    BY_HF,
    FAMILIES,
    Family,
    Graphs,
    UNet,
    albert,
    both_texts,
    deberta,
    gpt,
    hf,
    images,
    numbered,
    t5,
    text,
)

needs_hf = pytest.mark.skipif(hf is None, reason="the extra `dev` has transformers")


class Pooled(nn.Module):
    """Eight means of any outlet, weighted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, outlet: Tensor) -> Tensor:
        return F.adaptive_avg_pool1d(outlet.flatten(1).unsqueeze(1), 8).squeeze(1) * self.weight


def wrap(family: Family, **options: Any) -> LocalWrapper:
    with torch.random.fork_rng():
        backbone = family.build().double().train()
    return LocalWrapper(backbone, family.stages, **{"decoder": Pooled, "example": family.batch(), **options})


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_hf) if n in BY_HF else n for n in FAMILIES])
def test_gradients_of_a_family_are_right(name: str) -> None:
    family = FAMILIES[name]
    assert_local_gradients(wrap(family), family.batch(), family.batch())


@needs_hf
@pytest.mark.parametrize("name", ["Swin", "Swinv2", "PVTv2", "DeBERTa", "TimeSformer", "T5 encoder", "BLOOM"])
def test_what_the_docs_advise_for_a_family_holds(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs/your-backbone.md").read_text()
    assert f"`{FAMILIES[name].stages[0]}`" in page
    wrap(FAMILIES[name], decoder=TokenDecoder)


def test_a_graph_net_with_edge_features_trains_on_one_view_in_which_graphs_are_joined() -> None:
    """Two augmentations of a graph of five nodes: ten nodes, whose edges the user numbers."""

    def halves(vectors: Tensor) -> Tensor:
        a, b = vectors.chunk(2)
        return F.mse_loss(a, b) - vectors.std()

    ends = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 0, 6, 7, 8, 9, 5]])
    graph = (torch.rand(10, 8), torch.rand(10, 4), ends)
    model = LocalWrapper(Graphs(), numbered("layers"), decoder=Pooled, example=graph, loss=halves)
    assert_local_gradients(model, graph)
    with pytest.raises(
        ValueError, match=r"joined along the first axis .*\[2\]': \(2, 10\).*one view in which your inputs"
    ):
        model.local_step(graph, graph)


@needs_hf
@pytest.mark.parametrize("name", ["Swin", "BLOOM", "RevNet"])
def test_a_family_is_recomputed(name: str) -> None:
    family = FAMILIES[name]
    blocks = ("Layer", "Block", "Reversible")
    if name != "BLOOM":  # which has an embedding that is normalised, one tensor
        with pytest.raises(ValueError, match=r"checkpoint=True chooses no submodule of .*name their class"):
            wrap(family, checkpoint=True)
    model = wrap(family, checkpoint=lambda module: type(module).__name__.endswith(blocks), overlap=2)
    assert model._runs
    assert_local_gradients(model, family.batch(), family.batch())


# ---------------------------------------------------------------- what is shared is refused, with a way out


@needs_hf
def test_the_weights_that_all_layers_of_albert_use() -> None:
    layer = "encoder.albert_layer_groups"
    with pytest.raises(ValueError, match=rf"ran more than once.*'{layer}.0'.*one stage, which may end after 'encoder'"):
        wrap(Family(lambda: albert(1), ["embeddings", f"{layer}.0"], text))
    assert_local_gradients(wrap(Family(lambda: albert(1), ["embeddings", "encoder"], text)), text(), text())
    assert_local_gradients(wrap(Family(lambda: albert(3), numbered(layer), text)), text(), text())


def untied(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


@needs_hf
@pytest.mark.parametrize("way_out", ["one stage", "untie", "freeze"])
def test_a_head_that_is_tied_to_the_embedding(way_out: str) -> None:
    stages, model = ["transformer.h.0", "transformer.h.1", "lm_head"], gpt()
    message = (
        r"stage 2 \('lm_head'\) uses parameter 'transformer.wte.weight', which stage 0 \('transformer.h.0'\) uses too. .*"
        r"lie in one stage; or give each use a weight of its own .*or freeze it"
    )
    with pytest.raises(ValueError, match=message):
        wrap(Family(lambda: model, stages, text))
    if way_out == "untie":
        untied(model)
    elif way_out == "freeze":
        model.transformer.wte.weight.requires_grad_(False)
    options: dict[str, Any] = {"overlap": 0} if way_out == "one stage" else {}
    kept = Family(lambda: model, ["lm_head"] if way_out == "one stage" else stages, text)
    assert_local_gradients(wrap(kept, **options), text(), text())


@needs_hf
def test_the_words_that_both_halves_of_t5_share() -> None:
    stages = [*numbered("encoder.block"), "decoder"]
    with pytest.raises(ValueError, match=r"stage 3 \('decoder'\) uses parameter 'shared.weight', which stage 0"):
        wrap(Family(lambda: t5(tied=True), stages, both_texts))
    model = t5(tied=True)
    model.shared.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    assert_local_gradients(wrap(Family(lambda: model, stages, both_texts)), both_texts(), both_texts())


@needs_hf
def test_what_the_encoder_of_t5_gives_to_every_block_of_the_decoder() -> None:
    stages = [*numbered("encoder.block"), "decoder.block.0", "decoder.block.1"]
    with pytest.raises(ValueError, match=r"stage 4 .* uses an activation of 'encoder.final_layer_norm'"):
        wrap(Family(lambda: t5(tied=False), stages, both_texts))


@needs_hf
@pytest.mark.parametrize("v2", [False, True])
def test_the_relative_positions_that_all_layers_of_deberta_use(v2: bool) -> None:
    options = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4}

    def build() -> Any:
        if not v2:
            return deberta(**options)
        return hf.DebertaV2Model(
            hf.DebertaV2Config(vocab_size=40, norm_rel_ebd="layer_norm", share_att_key=True, **options, **ATTENTION)
        )

    what = "an activation of 'encoder.LayerNorm'" if v2 else "parameter 'encoder.rel_embeddings.weight'"
    with pytest.raises(ValueError, match=rf"stage 1 \('encoder.layer.1'\) uses {what}.*freeze"):
        wrap(Family(build, numbered("encoder.layer"), text))
    model = build()
    model.encoder.rel_embeddings.requires_grad_(False)
    if v2:
        model.encoder.LayerNorm.requires_grad_(False)
    assert_local_gradients(wrap(Family(lambda: model, numbered("encoder.layer"), text)), text(), text())


def test_a_unet_is_told_that_activations_cross_and_its_encoder_alone_works() -> None:
    crossing = (
        r"stage 2 \('u2'\) uses the outlet of stage 0 \('d2'\). A skip connection .*of a U-Net, its encoder alone works"
    )
    with pytest.raises(ValueError, match=crossing):
        wrap(Family(UNet, ["d2", "d3", "u2", "u1"], images(16)))
    with pytest.raises(
        ValueError, match=r"stage 1 \('u1'\) uses an activation of 'd1', made in stage 0 \('u2'\)"
    ) as told:
        wrap(Family(UNet, ["u2", "u1"], images(16)))
    assert "parameter" not in str(told.value).split(". A skip", maxsplit=1)[0]
    assert_local_gradients(wrap(Family(UNet, ["d1", "d2", "d3"], images(16))), images(16)(), images(16)())
