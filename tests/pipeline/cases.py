"""Models to be divided up, and their one-process reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet
from zoo import ZOO, conv, small

from locallearn import InfoNCE, LocalWrapper, MLPDecoder, TokenDecoder, UpperOnly
from locallearn.pipeline import Pipeline
from locallearn.testing import local_gradients

STEPS = 3


class Case(NamedTuple):
    """A model, and batches for it: ``views(step, rows)``."""

    build: Callable[[], LocalWrapper]
    views: Callable[[int, int], tuple[Any, ...]]


def images(size: int) -> Callable[[int, int], tuple[Tensor, ...]]:
    def views(step: int, rows: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(step)
        return torch.rand(2, rows, 3, size, size, generator=generator).unbind()

    return views


def tokens(step: int, rows: int) -> tuple[Tensor, ...]:
    """Sentences of up to six words; 0 is padding."""
    generator = torch.Generator().manual_seed(step)
    words = torch.randint(1, 40, (2, rows, 6), generator=generator)
    lengths = torch.randint(2, 7, (2, rows, 1), generator=generator)
    return torch.where(torch.arange(6) < lengths, words, 0).unbind()


def chain(n: int, **options: Any) -> Case:
    """Convolutions with BatchNorm, the first of which begin in place."""

    def build() -> LocalWrapper:
        torch.manual_seed(0)
        parts = [nn.Sequential(conv(3 if k == 0 else 4, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True)) for k in range(n)]
        return LocalWrapper(
            nn.Sequential(*parts), list(range(n)), decoder=small, example=torch.rand(2, 3, 8, 8), **options
        )

    return Case(build, images(8))


def nested() -> LocalWrapper:
    """Cuts inside of Sequentials of Sequentials, and BatchNorm behind the last one."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(conv(3, 4), nn.Sequential(conv(4, 4), nn.Dropout(0.3)), nn.ReLU(inplace=True)),
        nn.Sequential(conv(4, 4), conv(4, 4)),
        nn.BatchNorm2d(4),
    )
    return LocalWrapper(net, ["0.0", "0", "1.0", "1"], decoder=small, example=torch.rand(2, 3, 8, 8))


def of_zoo(name: str) -> Case:
    specimen = ZOO[name]

    def build() -> LocalWrapper:
        torch.manual_seed(0)
        example = torch.rand(2, 3, specimen.size, specimen.size)
        return LocalWrapper(specimen.build(), specimen.stages, decoder=specimen.decoder, example=example)

    return Case(build, images(specimen.size))


def resnet50() -> LocalWrapper:
    """Narrow, for the time it takes."""
    torch.manual_seed(0)
    net = ResNet(Bottleneck, [3, 4, 6, 3], num_classes=7, width_per_group=8)
    return LocalWrapper(net, ["layer1", "layer2", "layer3", "layer4"], decoder=small, example=torch.rand(2, 3, 32, 32))


class Encoder(nn.Module):
    """Layers that all read a mask made of the words, a buffer that all share, and BatchNorm behind the last layer."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(layers))
        self.register_buffer("scale", torch.tensor(1.5))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, words: Tensor) -> Tensor:
        mask = words == 0
        x = self.embedding(words)
        for layer in self.layers:
            x = layer(x * self.scale, src_key_padding_mask=mask)
        result: Tensor = self.norm(x.mean(1))
        return result


def encoder() -> LocalWrapper:
    torch.manual_seed(0)
    return LocalWrapper(Encoder(), [f"layers.{k}" for k in range(4)], decoder=TokenDecoder, example=tokens(0, 2)[0])


class Pairs(nn.Module):
    """Every block hands on two maps and a mask, of which the second map skips a block, and takes a mapping's arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TwoMaps(8) for _ in range(4))

    def forward(self, *, images: Tensor, mask: Tensor, scale: float) -> Tensor:
        state: Any = {"a": images * scale, "b": images, "mask": mask}
        for block in self.blocks:
            state = block(state)
        result: Tensor = state["a"]
        return result


class TwoMaps(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(width, width), nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, state: Any) -> Any:
        a = self.norm(self.a(state["a"] * state["mask"]).relu() + state["b"])
        return {"a": a, "b": self.b(a) + state["b"], "mask": state["mask"]}


def pairs() -> LocalWrapper:
    torch.manual_seed(0)
    cuts = [f"blocks.{k}" for k in range(4)]
    return LocalWrapper(Pairs(), cuts, decoder=MLPDecoder, features="a", example=[of_pairs(0, 2)[0]])


def of_pairs(step: int, rows: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(step)
    return tuple(
        {
            "images": torch.rand(rows, 8, generator=generator),
            "mask": (torch.rand(rows, 8, generator=generator) > 0.3).double(),
            "scale": 2.0 + step,
        }
        for _ in range(2)
    )


class Masked(nn.Module):
    """A Hugging Face encoder, its mask made of the words."""

    def __init__(self) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        config = BertConfig(
            vocab_size=40,
            hidden_size=8,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
        )
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, words: Tensor) -> Tensor:
        result: Tensor = self.bert(words, attention_mask=(words != 0).long()).last_hidden_state
        return result


def bert() -> LocalWrapper:
    torch.manual_seed(0)
    cuts = [f"bert.encoder.layer.{k}" for k in range(4)]
    return LocalWrapper(Masked(), cuts, decoder=TokenDecoder, example=tokens(0, 2)[0])


def sentences(step: int, rows: int) -> tuple[Any, ...]:
    return tuple({"input_ids": words, "attention_mask": (words != 0).long()} for words in tokens(step, rows))


def bert_by_name() -> LocalWrapper:
    """The encoder itself, whose mask is an argument."""
    torch.manual_seed(0)
    cuts = [f"encoder.layer.{k}" for k in range(4)]
    return LocalWrapper(Masked().bert, cuts, decoder=TokenDecoder, example=[sentences(0, 2)[0]])


CASES = {
    "gim": chain(4, overlap=0),
    "loco": chain(4),
    "upper only": chain(4, sharing=UpperOnly()),
    "overlap 2": chain(5, overlap=2),
    "overlap 3": chain(5, overlap=3),
    "end to end": chain(4, overlap=3),
    "nested": Case(nested, images(8)),
    "resnet50": Case(resnet50, images(32)),
    "encoder": Case(encoder, tokens),
    "pairs": Case(pairs, of_pairs),
    "bert": Case(bert, tokens),
    "bert by name": Case(bert_by_name, sentences),
    **{name: of_zoo(name) for name in ZOO},
}


def adamw(weights: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=0.01)


def sgd(weights: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, lr=0.1, momentum=0.9)


def single(case: Case) -> LocalWrapper:
    """For one process; a pipeline takes InfoNCE of its own rows by itself."""
    model = case.build()
    if isinstance(model.loss, InfoNCE):
        model.loss.gather = False
    return model


def off(pipe: Pipeline, one: LocalWrapper) -> float:
    """The largest difference of anything that this rank holds."""
    theirs = one.state_dict()
    ours = pipe.state_dict()["model"]
    assert ours
    return max(float((ours[name].detach().double() - theirs[name].double()).abs().max()) for name in ours)


def pipeline(case: Case, ranks: Sequence[int], optimizer: Any = sgd, **options: Any) -> Pipeline:
    options = {"example": [case.views(0, 2)[0]], "timeout": timedelta(seconds=60)} | options
    return Pipeline(case.build(), ranks, optimizer, **options)


def compare(name: str, ranks: Sequence[int], rank: int) -> float:
    """The largest difference to one process in three steps, of which the second has a smaller batch."""
    case = CASES[name]
    one = single(case)
    optimizer = sgd([*one.parameters()])
    pipe = pipeline(case, ranks)
    worst = 0.0
    for step in range(STEPS):
        given = case.views(step, 3 if step == 1 else 4)
        one.local_step(*given, seed=step)
        losses = pipe.step(*given, seed=step) if rank == 0 else pipe.step()
        optimizer.step()
        optimizer.zero_grad()
        assert one.losses is not None
        worst = max([worst, *(one.losses[list(pipe.units)] - losses).abs().tolist(), off(pipe, one)])
    pipe.flush()
    return worst


def compare_eager(name: str, ranks: Sequence[int], rank: int, optimizer: Any) -> float:
    """The same against one process in which the highest stage of every rank but the last gets its gradient a step later."""
    case = CASES[name]
    one = single(case)
    ours = optimizer([*one.parameters()])
    ends = [sum(ranks[: k + 1]) - 1 for k in range(len(ranks) - 1)]
    stages = local_gradients(one, *case.views(0, 4)).stages
    delayed = [weight for name, weight in one.named_parameters() if stages.get(name) in ends]
    pipe = pipeline(case, ranks, optimizer, mode="eager")
    late: list[Tensor | None] = [None] * len(delayed)
    worst = 0.0
    for step in range(STEPS + 1):
        given = case.views(step, 3 if step == 1 else 4)
        if step < STEPS:
            one.local_step(*given, seed=step)
            pipe.step(*given, seed=step) if rank == 0 else pipe.step()
        else:
            pipe.flush()
        for at, weight in enumerate(delayed):
            weight.grad, late[at] = late[at], weight.grad
        ours.step()
        ours.zero_grad()
        if step == 0 and rank == 0 and ranks[0] == 1 and name == "loco":
            assert not pipe.optimizer.state, "nothing is trained in the first step"
        if step < STEPS:
            held = dict(pipe.model.named_parameters())
            theirs = dict(one.named_parameters())
            worst = max(worst, *(float((w - theirs[n]).detach().abs().max()) for n, w in held.items() if not w.is_meta))
        else:
            worst = max(worst, off(pipe, one))
    return worst
