"""Outlets of several tensors: each is cut by itself, and all gradients are the oracle's."""

from __future__ import annotations

import gc
import weakref
from collections import namedtuple
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from test_local_pass import PLANS, SCHEDULES
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from locallearn import LocalWrapper, MLPDecoder, Plan, Soft, Unit, memory_report
from locallearn._walk.segment import Segment, cut, overlapping
from locallearn._walk.trees import mapped, tensors
from locallearn.testing import assert_local_gradients

WIDTH = 6


class Layers(nn.Module):
    """Two linear layers, which the subclasses use."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)


class First(Layers):
    def forward(self, x: Tensor) -> Any:
        return self.one(x).tanh(), self.two(x).sin()


class Both(Layers):
    def forward(self, outlet: Any) -> Any:
        a, b = outlet
        return self.one(a + b).tanh(), self.two(a * b).sin()


class HandsThrough(Layers):
    """``b`` goes on as it is."""

    def forward(self, outlet: Any) -> Any:
        a, b = outlet
        return self.one(a).tanh(), b


class HandsThroughFirst(Layers):
    """What the decoder reads is the stage's own inlet."""

    def forward(self, outlet: Any) -> Any:
        a, b = outlet
        return a, self.one(b).tanh()


class SameTwice(Layers):
    def forward(self, outlet: Any) -> Any:
        a, b = outlet
        y = self.one(a + b).tanh()
        return y, y


class NeedsTheSame(Layers):
    def forward(self, outlet: Any) -> Any:
        a, b = outlet
        assert a is b
        return self.one(a).tanh(), self.two(a * b).sin()


class TwoViews(Layers):
    def forward(self, outlet: Any) -> Any:
        a, b = outlet
        y = self.one(a + b).tanh()
        return y[:, 1:], y.view(-1, 2, WIDTH // 2)


class OfViews(Layers):
    def forward(self, outlet: Any) -> Any:
        part, whole = outlet
        assert torch.equal(whole.flatten(1)[:, 1:], part)
        return self.one(whole.flatten(1)).sin(), self.two(torch.cat([part, part[:, :1]], 1))


class DoesNotUse(Layers):
    """``b`` ends here."""

    def forward(self, outlet: Any) -> Any:
        a, _ = outlet
        return self.one(a).tanh(), self.two(a).sin()


class Plain(Layers):
    """One tensor."""

    def forward(self, outlet: Any) -> Tensor:
        a, b = outlet
        return self.one(a - b).tanh() + self.two(b)


class InPlace(Layers):
    """Changes both inlets in place, and hands one through."""

    def forward(self, outlet: Any) -> Any:
        a, b = outlet
        a.mul_(2)
        return a, b.add_(self.one(a * 1))


class Straight(Layers):
    """Keeps nothing that an operation in place could spoil."""

    def forward(self, x: Tensor) -> Any:
        return self.one(x), self.two(x)


class ReturnsWeight(Layers):
    def forward(self, outlet: Any) -> Any:
        a, b = outlet
        return self.two(a * b).tanh(), self.one.bias


class Partly(Layers):
    """One of its outlets has no graph, another has numbers without gradients."""

    def forward(self, outlet: Any) -> Any:
        a, b = outlet
        return {"mask": a.detach() > 0, "x": self.one(a).tanh(), "rest": [self.two(b), None, a.detach(), "text"]}


class OfParts(Layers):
    def forward(self, outlet: Any) -> Any:
        return self.one(outlet["x"] * outlet["mask"]), self.two(outlet["rest"][0] + outlet["rest"][2])


@dataclass
class State:
    x: Tensor
    step: int
    y: list[Tensor]


Named = namedtuple("Named", ["x", "y"])


class ToState(Layers):
    def forward(self, outlet: Any) -> State:
        a, b = outlet
        return State(self.one(a), 3, [b, self.two(a)])


class ToNamed(Layers):
    def forward(self, state: State) -> Any:
        assert type(state) is State
        assert state.step == 3
        return Named(self.one(state.x * state.y[1]).sin(), self.two(state.y[0]))


class OfNamed(Layers):
    def forward(self, named: Any) -> Any:
        return self.one(named.x), self.two(named.x * named.y)


CHAINS: dict[str, list[type[nn.Module]]] = {
    "all are used": [First, Both, Both, Both],
    "handed through": [First, HandsThrough, HandsThrough, Both],
    "handed through and read": [First, HandsThroughFirst, HandsThroughFirst, Both],
    "used by a later stage only": [First, HandsThrough, Both, HandsThrough],
    "the same twice": [First, SameTwice, NeedsTheSame, SameTwice],
    "views of one another": [First, TwoViews, OfViews, Both],
    "not used": [First, DoesNotUse, Both, DoesNotUse],
    "one tensor at the end": [First, Both, Plain],
    "in place": [Straight, InPlace, InPlace, Both],
    "a weight": [First, ReturnsWeight, Both, Both],
    "some without a graph": [First, Partly, OfParts, Both],
    "classes": [First, ToState, ToNamed, OfNamed],
}


def everything(outlet: Any) -> Tensor:
    """A value for ``features=`` that reads all tensors there are."""
    return sum(t.flatten(1)[:, :5] for t in tensors(outlet) if t.is_floating_point() and t.ndim > 1)  # type: ignore[return-value]


FEATURES: dict[str, Any] = {"the first": None, "all": everything}


def wrap(chain: str, **options: Any) -> LocalWrapper:
    net = nn.Sequential(*[kind() for kind in CHAINS[chain]])
    return LocalWrapper(net, range(len(net)), **{"decoder": MLPDecoder, "example": torch.rand(2, WIDTH), **options})


def views() -> tuple[Tensor, ...]:
    return torch.rand(2, 4, WIDTH).unbind()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "policy" in metafunc.fixturenames:
        ways = list(product(SCHEDULES, FEATURES, [False, Layers]))
        if metafunc.config.getoption("--full"):
            cross = [(chain, plan, *way) for chain in CHAINS for plan in PLANS for way in ways]
        else:  # schedules, features and recomputation take turns
            pairs = [(chain, plan) for at, chain in enumerate(CHAINS) for plan in list(PLANS)[at % 3 :: 3]]
            cross = [(*pair, *ways[at % len(ways)]) for at, pair in enumerate(pairs)]
        in_place = {"schedule": "sequential", "policy": False}
        cases = [
            (
                chain,
                plan,
                *((in_place["schedule"], how, in_place["policy"]) if chain == "in place" else (way, how, policy)),
            )
            for chain, plan, way, how, policy in cross
            if len(CHAINS[chain]) > 3 or plan != "overlap 3"
        ]
        metafunc.parametrize(("chain", "plan", "schedule", "features", "policy"), list(dict.fromkeys(cases)))


def test_gradients_are_the_oracles(chain: str, plan: str, schedule: str, features: str, policy: Any) -> None:
    model = wrap(
        chain,
        plan=PLANS[plan](len(CHAINS[chain])),
        schedule=SCHEDULES[schedule],
        features=FEATURES[features],
        checkpoint=policy,
    )
    assert_local_gradients(model, *views())


@pytest.mark.parametrize("chain", ["all are used", "handed through"])
def test_soft_sharing_copies_a_stage_that_takes_the_whole_outlet(chain: str) -> None:
    model = wrap(chain, sharing=Soft(0.1))
    model.decoders[0][0].stage.one.bias.data += 1  # type: ignore[index, union-attr, operator]
    assert_local_gradients(model, *views())
    assert max(memory_report(model, *views()).counted) > 0


class Unpacks(nn.Module):
    """Its second stage takes a part of the outlet below."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = First(), Both(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x))[0])  # type: ignore[no-any-return]


def test_soft_sharing_is_refused_where_the_next_stage_takes_a_part_of_the_outlet() -> None:
    options: dict[str, Any] = {"decoder": MLPDecoder, "example": torch.rand(2, WIDTH)}
    with pytest.raises(ValueError, match="soft sharing copies stage 2, which must be one module"):
        LocalWrapper(Unpacks(), ["a", "b", "c"], sharing=Soft(), **options)
    assert_local_gradients(LocalWrapper(Unpacks(), ["a", "b", "c"], **options), *views())


# ---------------------------------------------------------------- what a unit's gradient reaches


@pytest.mark.parametrize(("unit", "reached"), [(Unit(0, 2), {0, 1, 2}), (Unit(1, 2), {1, 2}), (Unit(2, 2), {2})])
def test_a_tensor_that_is_handed_through_takes_the_gradient_as_far_as_the_unit_goes(
    unit: Unit, reached: set[int]
) -> None:
    """``b`` is made by stage 0 and used by stage 2: its maker is trained if and only if the unit spans both."""
    net = nn.Sequential(First(), HandsThrough(), Both())
    model = LocalWrapper(net, [0, 1, 2], plan=Plan(3, [unit]), decoder=MLPDecoder, example=torch.rand(2, WIDTH))
    model.local_step(*views())
    assert {
        k for k, stage in enumerate(net) if any(w.grad is not None and w.grad.any() for w in stage.parameters())
    } == reached
    maker = net[0].two.weight.grad  # type: ignore[union-attr]
    assert (maker is not None and bool(maker.any())) == (0 in reached)  # type: ignore[union-attr, operator]


# ---------------------------------------------------------------- in place, on tensors that share memory


class ViewsOf(Layers):
    copies = False

    def forward(self, x: Tensor) -> Any:
        y = self.one(x)
        return y, y[:, :3].clone() if self.copies else y[:, :3]


class Halves(Layers):
    def forward(self, x: Tensor) -> Any:
        y = torch.stack([self.one(x), self.two(x)])
        return y[0], y[1]


class ChangesOne(Layers):
    def forward(self, outlet: Any) -> Any:
        a, b = outlet
        a.mul_(self.two.bias)
        return self.one(a) + torch.cat([b] * (WIDTH // b.shape[1]), 1), b


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_change_in_place_of_one_of_two_views_is_refused(overlap: int) -> None:
    net = nn.Sequential(ViewsOf(), ChangesOne(), nn.Identity())
    model = LocalWrapper(net, [0, 1, 2], overlap, MLPDecoder, example=torch.rand(2, WIDTH))
    with pytest.raises(RuntimeError, match=r"stage 1 \('1'\) changes in place what stage 0 \('0'\) returned, .*clone"):
        model.local_step(*views())
    net[0].copies = True
    assert_local_gradients(model, *views())


def test_pieces_of_one_tensor_that_do_not_overlap_may_be_changed() -> None:
    net = nn.Sequential(Halves(), ChangesOne(), nn.Identity())
    model = LocalWrapper(net, [0, 1, 2], decoder=MLPDecoder, example=torch.rand(2, WIDTH))
    assert_local_gradients(model, *views())


def test_overlapping_tensors_are_found() -> None:
    x = torch.rand(4, 6, requires_grad=True) * 1
    assert overlapping((x, torch.rand(4, 6, requires_grad=True))) == []
    assert overlapping((x, x)) == []  # one tensor, which stays one
    assert overlapping((x[:2], x[2:])) == []
    assert overlapping((x, x.detach())) == []
    assert len(overlapping((x, [x[1:], x[3]]))) == 3


def test_a_decoder_that_changes_any_of_the_tensors_in_place_is_refused() -> None:
    ready: list[bool] = []
    model = wrap("all are used", features=lambda outlet: outlet[1].mul_(2) if ready else outlet[1])
    ready.append(True)
    with pytest.raises(
        RuntimeError, match="the decoder or the loss of unit 0 changes the outlet that it reads in place"
    ):
        model.local_step(*views())


# ---------------------------------------------------------------- features=


class Pair(nn.Module):
    def __init__(self, width: int, other: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, other)

    def forward(self, x: Any) -> Any:
        x = x if isinstance(x, Tensor) else x["narrow"]
        return {"narrow": self.a(x), "wide": self.b(x), "shape": (1, 2)}


class Second(nn.Module):
    def forward(self, x: Any) -> Any:
        return x["narrow"], x["wide"]


def pairs() -> nn.Sequential:
    return nn.Sequential(Pair(WIDTH, 9), Pair(WIDTH, 9), Second())


@pytest.mark.parametrize(
    ("features", "width"),
    [
        (None, WIDTH),
        (lambda o: o["wide"] if isinstance(o, dict) else o[1], 9),
        (lambda o: torch.cat(tensors(o), 1), WIDTH + 9),
    ],
)
def test_the_decoder_reads_what_features_says(features: Any, width: int) -> None:
    model = LocalWrapper(pairs(), [0, 1, 2], decoder=MLPDecoder, example=torch.rand(2, WIDTH), features=features)
    assert [decoder.channels for decoder in model.decoders] == [width, width]
    assert_local_gradients(model, *views())


@pytest.mark.parametrize(("features", "stages"), [("wide", [0, 1]), (1, [2])])
def test_a_key_and_an_index(features: Any, stages: list[int]) -> None:
    model = LocalWrapper(pairs(), stages, 0, MLPDecoder, example=torch.rand(2, WIDTH), features=features)
    assert {decoder.channels for decoder in model.decoders} == {9}
    assert_local_gradients(model, *views())


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            "wise",
            r"stage 0 ends after '0': features='wise' is not in a dict with the tensors \['narrow'\] \(2, 6\), \['wide'\]",
        ),
        ("shape", "features='shape' takes a tuple out of a dict with the tensors"),
        (lambda outlet: outlet["narrow"] > 0, r"returned torch.bool.*which of several tensors is read \(features=\)"),
        (lambda outlet: 1 / 0, "stage 0 ends after '0': division by zero"),
        (1.5, "features is an index or a key of what stages return, or a callable .* got 1.5"),
    ],
)
def test_features_that_are_not_there_are_told(features: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        LocalWrapper(pairs(), [0, 1], decoder=MLPDecoder, example=torch.rand(2, WIDTH), features=features)


# ---------------------------------------------------------------- segments and trees


def test_a_segment_of_several_tensors_frees_its_graph_without_the_collector() -> None:
    gc.disable()
    inlets, (a, b) = cut(
        (torch.rand(2, 3, requires_grad=True) * 1, torch.rand(2, 3, requires_grad=True) * 1), differentiable=True
    )
    part = Segment({"sum": a + b, "product": [a * b, a]}, inlets)
    known = weakref.ref(part.outlets[1])
    first = part.pull([torch.ones(2, 3), None, None], retain=True)
    assert len(first) == 2
    torch.testing.assert_close(part.pull([None, None, torch.ones(2, 3)], retain=True), [torch.ones(2, 3), None])
    assert part.pull([None, torch.ones(2, 3), torch.ones(2, 3)], retain=False)
    del part, a, b
    gc.enable()
    assert known() is None


def test_trees_keep_their_classes_and_go_through_dataclasses() -> None:
    state = State(torch.ones(1), 2, [torch.ones(2), torch.ones(3)])
    doubled = mapped(lambda tensor: 2 * tensor, (state, Named(1, state.x), None))
    assert (type(doubled[0]), doubled[0].step, type(doubled[1])) == (State, 2, Named)
    assert [len(tensor) for tensor in tensors((state, state.x))] == [1, 2, 3]
    assert doubled[0].y[1].sum() == 6
    assert state.y[1].sum() == 3


class Holder:
    """No pytree."""

    def __init__(self, held: Tensor) -> None:
        self.held = held


class Hides(Layers):
    def forward(self, x: Tensor) -> Any:
        y = self.one(x)
        hidden = self.two(y)  # only the next stage uses these weights, which are its own therefore
        return y.tanh(), Holder(hidden)


class Finds(Layers):
    def forward(self, outlet: Any) -> Tensor:
        return self.one(outlet[0]) * outlet[1].held


def test_what_an_unknown_object_holds_crosses_the_cut_and_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stage 1 \('1'\) uses an activation of '0.one', made in stage 0 \('0'\)"):
        LocalWrapper(nn.Sequential(Hides(), Finds()), [0, 1], decoder=MLPDecoder, example=torch.rand(2, WIDTH))


class Recurrent(nn.Module):
    """Layers that hand on a `PackedSequence`, a tuple that cannot be made of anything but tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.r1 = nn.GRU(4, 3, batch_first=True)
        self.r2 = nn.GRU(3, 3, batch_first=True)
        self.r3 = nn.LSTM(3, 3, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        for layer in (self.r1, self.r2, self.r3):
            packed, _ = layer(packed)
        return pad_packed_sequence(packed, batch_first=True)[0]


@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_texts_of_different_lengths(overlap: int) -> None:
    def padded(outlet: Any) -> Tensor:
        return pad_packed_sequence(outlet[0], batch_first=True, total_length=5)[0]

    views = [(torch.randn(4, 5, 4), torch.tensor(lengths)) for lengths in ([5, 3, 2, 4], [5, 4, 2, 1])]
    model = LocalWrapper(Recurrent(), ["r1", "r2", "r3"], overlap, features=padded, example=views[0])
    assert_local_gradients(model, *views)
