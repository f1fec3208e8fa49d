"""Batches that are not one tensor: tuples and mappings of tensors and constants, joined leaf by leaf."""

from __future__ import annotations

from collections import UserDict
from functools import partial
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from locallearn import LocalWrapper, MLPDecoder, memory_report, plan_stages
from locallearn._fitting.batches import concatenated, example_batch, rows
from locallearn.testing import assert_local_gradients


class Joint(nn.Module):
    """Takes images and words, a scale for each example, one for all, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6)
        self.maps, self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(
        self, maps: Tensor, words: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, power: int = 1
    ) -> Tensor:
        x = (self.maps(maps) + self.words(words).mean(1)).tanh()
        x = x if scale is None else x * scale
        x = x if bias is None else x + bias
        return self.b(self.a(x**power).tanh())  # type: ignore[no-any-return]


def mapping(n: int = 4) -> dict[str, Any]:
    return {
        "maps": torch.rand(n, 4),
        "words": torch.randint(20, (n, 5)),
        "scale": torch.rand(n, 1),
        "bias": torch.full((1, 6), 0.5),
        "power": 2,
    }


def pair(n: int = 4) -> tuple[Any, ...]:
    return torch.rand(n, 4), torch.randint(20, (n, 5))


FORMS: dict[str, Any] = {
    "a dict": mapping,
    "a UserDict, as BatchEncoding is one": lambda n=4: UserDict(mapping(n)),
    "a mapping": lambda n=4: MappingProxyType(mapping(n)),
    "a tuple": pair,
    "a tuple with None": lambda n=4: (*pair(n), None, torch.tensor(0.3), 3),
}


def wrap(form: str = "a dict", **options: Any) -> LocalWrapper:
    return LocalWrapper(Joint(), ["a", "b"], **{"decoder": MLPDecoder, "example": FORMS[form](2), **options})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("checkpoint", [False, nn.Linear])
def test_a_view_may_be_a_mapping_or_a_tuple(form: str, checkpoint: Any) -> None:
    model = wrap(form, checkpoint=checkpoint)
    assert_local_gradients(model, FORMS[form](), FORMS[form]())


def test_two_mappings_give_what_the_joined_one_gives() -> None:
    one, other = mapping(), mapping()
    joined = concatenated([one, other])
    assert joined["maps"].shape == (8, 4)
    assert torch.equal(joined["words"], torch.cat([one["words"], other["words"]]))
    assert joined["bias"].shape == (1, 6)
    assert joined["power"] == 2
    model = wrap(loss=lambda a, b: (a * b).mean())
    again = wrap(loss=lambda z: (z[:4] * z[4:]).mean())
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.local_step(one, other), again.local_step(joined))


def test_views_are_neither_copied_nor_given_a_gradient() -> None:
    view = {**mapping(), "maps": torch.rand(4, 4, requires_grad=True)}
    joined = concatenated([view])
    assert joined["maps"].data_ptr() == view["maps"].data_ptr()
    assert not joined["maps"].requires_grad
    wrap(loss=lambda z: z.square().mean()).local_step(view)
    assert view["maps"].grad is None
    assert concatenated([view], copy=True)["maps"].data_ptr() != view["maps"].data_ptr()
    chunks = torch.rand(8, 4).chunk(2)
    assert concatenated([(chunk, 1) for chunk in chunks])[0].data_ptr() == chunks[0].data_ptr()


class Overwrites(Joint):
    def forward(self, maps: Tensor, words: Tensor) -> Tensor:
        return super().forward(maps.mul_(2), words)


def test_a_view_in_a_tuple_is_not_overwritten() -> None:
    views = [pair(), pair()]
    before = [view[0].clone() for view in views]
    model = LocalWrapper(Overwrites(), ["a", "b"], decoder=MLPDecoder, example=pair(2))
    model.local_step(*views)
    assert all(torch.equal(view[0], known) for view, known in zip(views, before, strict=True))


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (mapping(), {**mapping(), "power": 3}, r"differ in the constant \['power'\].*got 2, 3"),
        (mapping(), {**mapping(), "bias": torch.zeros(1, 6)}, r"differ in the constant \['bias'\]"),
        (mapping(), pair(), r"need the same form; got \[\"\['maps'\]\""),
        (pair(4), pair(6), r"same shape, dtype and device; .*for \[0\]. Views of several sizes \(multi-crop\)"),
        (
            (torch.rand(4, 4), torch.zeros(2, 9)),
            (torch.rand(4, 4), torch.zeros(2, 9)),
            r"first axis of their tensors, which has to be the same; got \{'\[0\]': \(4, 4\), '\[1\]': \(2, 9\)\}",
        ),
    ],
)
def test_views_that_cannot_be_joined_are_told_why(one: Any, other: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrap().local_step(one, other)


def test_the_batch_axis_is_that_of_all_tensors_with_more_than_a_row() -> None:
    assert rows(mapping()) == 4
    assert rows({"a": torch.zeros(1, 3), "b": torch.zeros(1)}) == 1
    assert rows((torch.zeros(4, 2), torch.zeros(2, 9))) is None
    assert rows(torch.zeros(5, 2)) == 5


def test_an_example_that_is_a_list_is_one_of_views() -> None:
    net = nn.Identity()
    assert example_batch(net, [mapping(2), mapping(2)])["maps"].shape == (4, 4)
    assert [len(tensor) for tensor in example_batch(net, pair(2))] == [2, 2]


def test_a_batch_that_the_backbone_does_not_take_is_told_with_its_shapes() -> None:
    with pytest.raises(
        ValueError, match=r"does not run on the batch \{'x': '\(2, 4\) torch.float64'\}.*unexpected keyword"
    ):
        LocalWrapper(Joint(), ["a", "b"], decoder=MLPDecoder, example={"x": torch.rand(2, 4)})


def test_the_memory_of_such_batches_is_planned_and_reported() -> None:
    chosen = plan_stages(Joint(), mapping(64), 2, decoder=MLPDecoder)
    model = LocalWrapper(Joint(), chosen.stages, decoder=MLPDecoder, example=mapping(2))
    report = memory_report(model, mapping(32), mapping(32))
    assert max(report.predicted) == pytest.approx(max(report.counted), rel=0.1)
    assert (
        LocalWrapper(Joint(), "auto", 0, decoder=MLPDecoder, example=mapping(2), plan=model.plan).stages
        == chosen.stages
    )


# ---------------------------------------------------------------- one view and targets of any shape


class GPT(nn.Module):
    """Blocks with causal attention; ``length`` is frozen and goes in as integers."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(20, 8), nn.Embedding(9, 8)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 8, 0.1, batch_first=True) for _ in range(3))

    def forward(self, tokens: Tensor, padded: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.tokens(tokens) + self.places.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=x.dtype)
        for block in self.blocks:
            x = block(x, src_mask=mask, src_key_padding_mask=padded.to(x.dtype) * -1e9)
        return x


@pytest.mark.parametrize("frozen", [False, True])
def test_next_tokens_are_targets_of_any_shape(frozen: bool) -> None:
    def loss(logits: Tensor, following: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=-1)

    net = GPT()
    net.tokens.requires_grad_(not frozen)
    tokens = torch.randint(20, (4, 7))
    view = {"tokens": tokens[:, :-1], "padded": torch.zeros(4, 6, dtype=torch.bool)}
    following = tokens[:, 1:].clone()
    following[0, 3:] = -1
    model = LocalWrapper(
        net,
        [f"blocks.{k}" for k in range(3)],
        decoder=partial(nn.Linear, out_features=20),
        example=view,
        loss=loss,
    )
    assert_local_gradients(model, view, targets=following)
    model.local_step(view, targets=following)
    assert (net.tokens.weight.grad is None) == frozen
