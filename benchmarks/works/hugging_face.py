"""Hugging Face's networks, from tiny configurations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from works import families
from works.families import ATTENTION, BY_HF, FAMILIES, Family, hf, images, numbered, text, words
from works.kinds import Network, Way, of


def of_transformers(
    name: str, batch: Callable[[], Any], /, *, stages: Sequence[str] | None = None, **config: Any
) -> Network:
    """The model that `AutoModel` makes of a tiny configuration."""

    def make() -> tuple[nn.Module, Callable[[], Any]]:
        return hf.AutoModel.from_config(hf.AutoConfig.for_model(name, **config)), batch

    return Network("transformers", make, stages)


def ids() -> dict[str, Tensor]:
    return {"input_ids": words(8)}


FOUR = {**ATTENTION, "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64}
PATCHES = {**FOUR, "image_size": 32, "patch_size": 8}
WORDS = {**FOUR, "vocab_size": 40}
CAUSAL = {
    **WORDS,
    "use_cache": False,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SOUND = {
    **FOUR,
    "layerdrop": 0.0,  # a layer that is left out now and then cannot end a stage
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
MAPS = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}


def _speech(name: str) -> Network:
    """Its first layers make their input one that has a gradient, in training; frozen they do not."""
    whole = of_transformers(name, sound, **SOUND)

    def make() -> tuple[nn.Module, Callable[[], Any]]:
        model, batch = whole.make()
        model.feature_extractor._freeze_parameters()  # type: ignore[operator, union-attr]
        return model, batch

    return Network("transformers", make)


def sound() -> Tensor:
    return torch.rand(2, 2000)


def transformers_networks() -> dict[str, Network]:
    if hf is None:
        return {}

    gpt_neox = {k: v for k, v in CAUSAL.items() if k != "num_key_value_heads"}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    distil = {"vocab_size": 40, "dim": 32, "n_layers": 4, "n_heads": 2, "hidden_dim": 64}
    layers = {
        "d_model": 32,
        "encoder_layers": 4,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_attention_heads": 2,
    }
    many = {
        **{name: of_transformers(name, text, **WORDS) for name in ("bert", "roberta", "electra", "mpnet", "ernie")},
        **{
            name: of_transformers(name, text, **CAUSAL)
            for name in ("llama", "mistral", "qwen2", "gemma", "phi", "olmo")
        },
        **{
            name: of_transformers(name, images(32), **PATCHES)
            for name in ("vit", "deit", "dinov2", "dinov3_vit", "ijepa")
        },
        **{name: _speech(name) for name in ("wav2vec2", "hubert", "wavlm")},
        **{name: of_transformers(name, images(64), **MAPS) for name in ("convnext", "convnextv2")},
        "beit": of_transformers("beit", images(32), **PATCHES, use_relative_position_bias=True),
        "data2vec-vision": of_transformers("data2vec-vision", images(32), **PATCHES),
        "resnet": of_transformers("resnet", images(64), embedding_size=8, **MAPS),
        "regnet": of_transformers("regnet", images(64), embedding_size=8, groups_width=4, **MAPS),
        "bit": of_transformers("bit", images(64), embedding_size=8, num_groups=4, **MAPS),
        "poolformer": of_transformers("poolformer", images(64), **MAPS),
        "segformer": of_transformers("segformer", images(64), **MAPS, num_attention_heads=[1, 1, 2, 2]),
        "focalnet": of_transformers("focalnet", images(64), image_size=64, embed_dim=8, depths=[1, 1, 1, 1]),
        "mobilenet_v2": of_transformers("mobilenet_v2", images(64), depth_multiplier=0.35),
        "clip_vision_model": of_transformers("clip_vision_model", images(32), **PATCHES),
        "siglip_vision_model": of_transformers("siglip_vision_model", images(32), **PATCHES),
        "videomae": of_transformers("videomae", lambda: torch.rand(2, 4, 3, 32, 32), **PATCHES, num_frames=4),
        "vivit": of_transformers(
            "vivit", lambda: torch.rand(2, 4, 3, 32, 32), **FOUR, image_size=32, num_frames=4, tubelet_size=[2, 8, 8]
        ),
        "distilbert": of_transformers("distilbert", text, **distil),
        "modernbert": of_transformers("modernbert", text, **WORDS, **special),
        "gpt2": of_transformers("gpt2", text, vocab_size=40, n_embd=32, n_layer=4, n_head=2, use_cache=False),
        "gpt_neox": of_transformers("gpt_neox", text, **gpt_neox),
        "opt": of_transformers("opt", text, **gpt_neox, ffn_dim=64, word_embed_proj_dim=32),
        "mixtral": of_transformers("mixtral", text, **CAUSAL, num_local_experts=4),
        "mamba": of_transformers("mamba", ids, vocab_size=40, hidden_size=16, num_hidden_layers=4, use_cache=False),
        "xlnet": _xlnet(),
        "whisper encoder": Network(
            "transformers",
            lambda: (
                hf.WhisperModel(hf.WhisperConfig(**layers, num_mel_bins=8, max_source_positions=20)).encoder,
                lambda: torch.rand(2, 8, 40),
            ),
        ),
        "audio-spectrogram-transformer": of_transformers(
            "audio-spectrogram-transformer",
            lambda: torch.rand(2, 32, 16),
            **FOUR,
            max_length=32,
            num_mel_bins=16,
            patch_size=8,
        ),
    }
    named = {name: of("transformers", FAMILIES[name]) for name in FAMILIES if name in BY_HF}
    return {f"transformers {name}": network for name, network in {**many, **named, **_sharing()}.items()}


def _xlnet() -> Network:
    """Positions first, and the batch behind them."""
    whole = of_transformers(
        "xlnet",
        ids,
        vocab_size=40,
        d_model=16,
        n_layer=4,
        n_head=2,
        d_inner=32,
        use_mems_train=False,
        stages=numbered("layer", 4),
    )
    first = {"features": lambda outlet: outlet[0].transpose(0, 1)}
    way = Way(
        "batch first, by `features=lambda outlet: outlet[0].transpose(0, 1)`",
        lambda: whole.make()[0],
        numbered("layer", 4),
        first,
    )
    return whole._replace(ways=[way])


def _sharing() -> dict[str, Network]:
    """Those of which several stages use one weight: refused, with ways out."""

    def frozen(build: Callable[[], Any], name: str) -> Callable[[], nn.Module]:
        def build_frozen() -> nn.Module:
            model = build()
            model.get_submodule(name).requires_grad_(False)
            return model  # type: ignore[no-any-return]

        return build_frozen

    def untied() -> nn.Module:
        model = families.gpt()
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        return model  # type: ignore[no-any-return]

    one, three = partial(families.albert, 1), partial(families.albert, 3)
    group = "encoder.albert_layer_groups"
    heads = ["transformer.h.0", "transformer.h.1", "lm_head"]
    halves = [*numbered("encoder.block"), "decoder"]
    tied, layer = partial(families.t5, tied=True), numbered("encoder.layer")
    relative = partial(families.deberta, relative_attention=True, pos_att_type=["c2p", "p2c"])
    return {
        "ALBERT, one group of layers": of(
            "transformers",
            Family(one, ["embeddings", f"{group}.0"], text),
            ways=[
                Way("all layers in one stage", one, ["embeddings", "encoder"]),
                Way("a group of layers for each stage", three, numbered(group)),
            ],
        ),
        "GPT-2 with its tied head": of(
            "transformers",
            Family(families.gpt, heads, text),
            ways=[
                Way("end before the head", families.gpt, heads[:2]),
                Way("untie the head", untied, heads),
                Way("freeze the embedding", frozen(families.gpt, "transformer.wte"), heads),
            ],
        ),
        "T5, words that both halves use": of(
            "transformers",
            Family(tied, halves, families.both_texts),
            ways=[
                Way("freeze the embedding", frozen(tied, "shared"), halves),
                Way("an embedding for each half", partial(families.t5, tied=False), halves),
            ],
        ),
        "DeBERTa, relative positions": of(
            "transformers",
            Family(relative, layer, text),
            ways=[Way("freeze them", frozen(relative, "encoder.rel_embeddings"), layer)],
        ),
    }
