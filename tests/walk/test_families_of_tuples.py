"""Families whose blocks return more than a tensor, or take more than one: wrapped as they are, and right.

Those that share weights or activations between stages are refused, and the way out that the message names works.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.video.mvit import MSBlockConfig, MViT

from locallearn import LocalWrapper, TokenDecoder
from locallearn.testing import assert_local_gradients

timm = pytest.importorskip("timm", reason="the extra `examples` has timm")
hf: Any = import_module("transformers") if find_spec("transformers") else None
needs_hf = pytest.mark.skipif(hf is None, reason="the extra `dev` has transformers")


class Family(NamedTuple):
    """A backbone, where to cut it, and a batch that it takes."""

    build: Callable[[], nn.Module]
    stages: list[str]
    batch: Callable[[], Any]


class Pooled(nn.Module):
    """Eight means of any outlet, weighted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, outlet: Tensor) -> Tensor:
        return F.adaptive_avg_pool1d(outlet.flatten(1).unsqueeze(1), 8).squeeze(1) * self.weight


def images(side: int = 32) -> Callable[[], Tensor]:
    return lambda: torch.rand(2, 3, side, side)


def words(length: int = 6) -> Tensor:
    return torch.randint(1, 40, (2, length))


def text() -> dict[str, Tensor]:
    return {"input_ids": words(), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}


def numbered(name: str, count: int = 3) -> list[str]:
    return [f"{name}.{at}" for at in range(count)]


ATTENTION = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 3, "num_heads": 2, "use_cache": False}
WINDOWS = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1, 2],
    "num_heads": [1, 2, 4],
    "window_size": 4,
}


def swinv2() -> nn.Module:
    model = hf.Swinv2Model(hf.Swinv2Config(**WINDOWS))
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)  # as it is made, gradients of so small a network reach 1e15
    return model  # type: ignore[no-any-return]


def hiera() -> nn.Module:
    return hf.HieraModel(  # type: ignore[no-any-return]
        hf.HieraConfig(
            image_size=[32, 32],
            embed_dim=8,
            depths=[1, 1, 2],
            num_heads=[1, 2, 4],
            masked_unit_size=[4, 4],
            masked_unit_attention=[True, True, False],
            num_query_pool=1,
        )
    )


def pvt() -> nn.Module:
    return hf.PvtV2Model(  # type: ignore[no-any-return]
        hf.PvtV2Config(
            hidden_sizes=[8, 16, 16, 16],
            depths=[1] * 4,
            num_attention_heads=[1, 1, 2, 2],
            sr_ratios=[2, 2, 1, 1],
            mlp_ratios=[2] * 4,
        )
    )


def deberta(**options: Any) -> nn.Module:
    return hf.DebertaModel(hf.DebertaConfig(vocab_size=40, **ATTENTION, **options))  # type: ignore[no-any-return]


def t5(*, tied: bool) -> nn.Module:
    """Both halves; they share the embedding of words."""
    model = hf.T5Model(hf.T5Config(**T5, num_decoder_layers=2))
    if not tied:
        model.decoder.embed_tokens = copy.deepcopy(model.shared)
    return model  # type: ignore[no-any-return]


def both_texts() -> dict[str, Tensor]:
    return {**text(), "decoder_input_ids": words(5)}


def mvit() -> nn.Module:
    blocks = [
        MSBlockConfig(heads, width, out, [3] * 3, [3] * 3, stride, [1, 2, 2])
        for heads, width, out, stride in [(1, 8, 8, [1, 1, 1]), (2, 8, 16, [1, 2, 2]), (2, 16, 16, [1, 1, 1])]
    ]
    return MViT(
        (32, 32),
        4,
        blocks,
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        num_classes=3,
    )


class Recurrent(nn.Module):
    """A stack of LSTMs or GRUs, which return what they put out, and their states."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(8, 8, batch_first=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        states = None
        for layer in self.layers:
            x, states = layer(x, states)
        return x


class Reversible(nn.Module):
    """A block of a RevNet: two streams, each changed by the other."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, streams: Any) -> Any:
        a, b = streams if isinstance(streams, tuple) else streams.chunk(2, 1)
        a = a + self.f(b).tanh()
        return a, b + self.g(a).tanh()


class Passes(nn.Module):
    """A layer of a graph net: edges are changed by their nodes, nodes by their edges."""

    def __init__(self) -> None:
        super().__init__()
        self.edge, self.node = nn.Linear(12, 4), nn.Linear(12, 8)

    def forward(self, x: Tensor, edges: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        edges = edges + self.edge(torch.cat([x[ends[0]] * x[ends[1]], edges], 1)).tanh()
        return x + self.node(torch.cat([x, torch.zeros(len(x), 4).index_add(0, ends[1], edges)], 1)).tanh(), edges


class Graphs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Passes() for _ in range(3))

    def forward(self, x: Tensor, edges: Tensor, ends: Tensor) -> Tensor:
        for layer in self.layers:
            x, edges = layer(x, edges, ends)
        return x


class TwoStreams(nn.Module):
    """Images and vectors, which meet at the top."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleDict({"maps": nn.Conv2d(3 if k == 0 else 4, 4, 3), "rows": nn.Linear(5, 5)}) for k in range(3)
        )
        self.ends = nn.ModuleList(nn.Identity() for _ in range(3))

    def forward(self, streams: dict[str, Tensor]) -> Any:
        for stage, end in zip(self.stages, self.ends, strict=True):
            streams = end({name: part(streams[name]).tanh() for name, part in stage.items()})
        return streams


FAMILIES: dict[str, Family] = {
    "Swin": Family(lambda: hf.SwinModel(hf.SwinConfig(**WINDOWS)), numbered("encoder.layers"), images()),
    "Swinv2": Family(swinv2, numbered("encoder.layers"), images()),
    "Hiera": Family(hiera, numbered("encoder.stages"), images()),
    "PVTv2": Family(pvt, numbered("encoder.layers", 4), images()),
    "T5 encoder": Family(lambda: hf.T5EncoderModel(hf.T5Config(**T5)), numbered("encoder.block"), text),
    "T5": Family(lambda: t5(tied=False), [*numbered("encoder.block"), "decoder"], both_texts),
    "BLOOM": Family(
        lambda: hf.BloomModel(hf.BloomConfig(vocab_size=40, hidden_size=16, n_layer=3, n_head=2, use_cache=False)),
        numbered("h"),
        text,
    ),
    "DeBERTa": Family(deberta, numbered("encoder.layer"), text),
    "RWKV": Family(
        lambda: hf.RwkvModel(
            hf.RwkvConfig(vocab_size=40, hidden_size=16, num_hidden_layers=3, intermediate_size=16, use_cache=False)
        ),
        numbered("blocks"),
        lambda: {"input_ids": words()},
    ),
    "TimeSformer": Family(
        lambda: hf.TimesformerModel(hf.TimesformerConfig(image_size=16, patch_size=8, num_frames=2, **ATTENTION)),
        numbered("encoder.layer"),
        lambda: torch.rand(2, 2, 3, 16, 16),
    ),
    "HRNet": Family(
        lambda: timm.create_model("hrnet_w18_small", num_classes=3), ["stage2", "stage3", "stage4"], images(32)
    ),
    "CrossViT": Family(
        lambda: timm.create_model("crossvit_tiny_240", num_classes=3, img_size=120), numbered("blocks"), images(120)
    ),
    "PiT": Family(
        lambda: timm.create_model("pit_ti_distilled_224", num_classes=3, img_size=64),
        numbered("transformers"),
        images(64),
    ),
    "MViT": Family(mvit, numbered("blocks"), lambda: torch.rand(2, 3, 4, 32, 32)),
    "LSTMs": Family(lambda: Recurrent(nn.LSTM), numbered("layers"), lambda: torch.rand(2, 5, 8)),
    "GRUs": Family(lambda: Recurrent(nn.GRU), numbered("layers"), lambda: torch.rand(2, 5, 8)),
    "RevNet": Family(
        lambda: nn.Sequential(*[Reversible() for _ in range(3)]), ["0", "1", "2"], lambda: torch.rand(2, 16)
    ),
    "two streams": Family(
        TwoStreams, numbered("ends"), lambda: ({"maps": torch.rand(2, 3, 9, 9), "rows": torch.rand(2, 5)},)
    ),
}


def wrap(family: Family, **options: Any) -> LocalWrapper:
    with torch.random.fork_rng():
        backbone = family.build().double().train()
    return LocalWrapper(backbone, family.stages, **{"decoder": Pooled, "example": family.batch(), **options})


BY_HF = {"Swin", "Swinv2", "Hiera", "PVTv2", "T5 encoder", "T5", "BLOOM", "DeBERTa", "RWKV", "TimeSformer"}


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


def albert(groups: int) -> nn.Module:
    return hf.AlbertModel(  # type: ignore[no-any-return]
        hf.AlbertConfig(vocab_size=40, embedding_size=8, num_hidden_groups=groups, **ATTENTION)
    )


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
    def gpt() -> Any:
        return hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=40,
                n_positions=8,
                n_embd=16,
                n_layer=2,
                n_head=2,
                use_cache=False,
                bos_token_id=0,
                eos_token_id=0,
            )
        )

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


class Down(nn.Sequential):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(nn.Conv2d(before, after, 3, padding=1), nn.ReLU())


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d1, self.d2, self.d3 = Down(3, 4), Down(4, 8), Down(8, 8)
        self.u2, self.u1 = Down(16, 4), Down(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        one = self.d1(x)
        two = self.d2(F.max_pool2d(one, 2))
        three = self.d3(F.max_pool2d(two, 2))
        two = self.u2(torch.cat([two, F.interpolate(three, scale_factor=2)], 1))
        return self.u1(torch.cat([one, F.interpolate(two, scale_factor=2)], 1))  # type: ignore[no-any-return]


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
