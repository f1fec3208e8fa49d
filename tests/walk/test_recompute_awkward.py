"""Recomputation of awkward blocks: the gradients of a pass without it, or an error that tells why not."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracle import assert_same, gradients
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from zoo import conv, small_net

from locallearn import LocalWrapper, MLPDecoder
from locallearn._fitting.recomputed import runs
from locallearn.memory import measure


def views(size: int = 8) -> tuple[Tensor, ...]:
    return torch.randn(2, 4, 3, size, size).unbind()


def wrap(backbone: nn.Module, stages: Any, policy: Any, overlap: int = 1) -> LocalWrapper:
    return LocalWrapper(backbone, stages, overlap, MLPDecoder, example=torch.rand(2, 3, 8, 8), checkpoint=policy)


def assert_as_without(backbone: nn.Module, stages: Any, policy: Any = True, overlap: int = 1, steps: int = 2) -> None:
    """Gradients, losses and buffers of several steps are those of a wrapper that recomputes nothing."""
    plain, again = wrap(backbone, stages, False, overlap), wrap(copy.deepcopy(backbone), stages, policy, overlap)
    assert again._runs
    again.load_state_dict(plain.state_dict())
    for _ in range(steps):
        pair, state = views(), torch.get_rng_state()
        expected = plain.local_step(*pair)
        torch.set_rng_state(state)
        torch.testing.assert_close(again.local_step(*pair), expected)
        assert_same(gradients(again), gradients(plain))
        for name, tensor in plain.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], tensor, msg=name)


# ---------------------------------------------------------------- where runs begin and end


class NormAct(nn.Module):
    """A block of simple layers that ends with an operation of its own."""

    def __init__(self, act: Callable[[Tensor], Tensor] = torch.sigmoid, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.act = norm or nn.GroupNorm(2, 4), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x))


class PreAct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x.relu())


class Shuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shuffle, self.conv = nn.ChannelShuffle(2), conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.shuffle(x)).tanh()


def test_a_run_does_not_reach_into_a_recomputed_block() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(), nn.Conv2d(4, 4, 3), NormAct())
    assert list(runs(net, ["1", "3"], True, torch.rand(2, 3, 8, 8))) == [("1",), ("3",)]
    assert_as_without(net, [1, 3])


class ConvNormAct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(4, 4), nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).sigmoid()


def test_a_block_of_simple_layers_is_recomputed_once_as_a_whole() -> None:
    net = nn.Sequential(conv(3, 4), nn.Tanh(), ConvNormAct(), conv(4, 4))
    assert list(runs(net, ["3"], True, torch.rand(2, 3, 8, 8))) == [("0", "1"), ("2",)]
    assert_as_without(net, [2, 3])


@pytest.mark.parametrize(
    "block",
    [
        NormAct,
        lambda: NormAct(torch.nn.functional.gelu, nn.BatchNorm2d(4)),
        lambda: NormAct(torch.tanh, nn.GELU()),
        Shuffled,
        PreAct,
        lambda: nn.Sequential(nn.BatchNorm2d(4), NormAct(), PreAct()),
        lambda: nn.Sequential(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), conv(4, 4), nn.BatchNorm2d(4)),
    ],
    ids=["norm", "batch norm", "gelu", "shuffle", "pre-activation", "nested", "sequentials"],
)
@pytest.mark.parametrize("policy", [True, (True, NormAct), (True, nn.Sequential), (True, nn.Conv2d, nn.BatchNorm2d)])
def test_blocks_that_begin_with_a_simple_layer_are_as_without(block: Callable[[], nn.Module], policy: Any) -> None:
    assert_as_without(nn.Sequential(conv(3, 4), block(), conv(4, 4), block(), conv(4, 4)), [1, 3, 4], policy)


class Doubles(nn.Sequential):
    """A container that does more than its children."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2)


class Triples(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        assert len(self) == 1
        return self[0](x)


def test_a_run_does_not_cross_into_a_container_that_does_more_than_its_children() -> None:
    net = nn.Sequential(conv(3, 4), nn.Tanh(), Doubles(nn.BatchNorm2d(4), nn.ReLU()), Triples(nn.Tanh()), conv(4, 4))
    assert list(runs(net, ["4"], True, torch.rand(2, 3, 8, 8))) == [("0", "1"), ("3",)]
    assert_as_without(net, [3, 4])


# ---------------------------------------------------------------- users' own checkpoints


class Mine(nn.Sequential):
    """Checkpoints itself."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Around(nn.Module):
    """Checkpoints a part of itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before, self.inner = conv(4, 4), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.inner, self.before(x).sin(), use_reentrant=False).cos()


@pytest.mark.parametrize(
    "policy", [True, PreAct, nn.Sequential, (True, nn.Sequential), (True, nn.Conv2d), Around, Mine]
)
@pytest.mark.parametrize("overlap", [0, 1])
def test_blocks_that_checkpoint_themselves_are_as_without(policy: Any, overlap: int) -> None:
    net = nn.Sequential(
        conv(3, 4),
        Mine(PreAct(), PreAct()),
        nn.Sequential(Around(PreAct()), PreAct()),
        nn.Sequential(
            Mine(conv(4, 4), nn.Tanh(), Mine(conv(4, 4), nn.Sigmoid())), Around(Mine(PreAct(), nn.Dropout(0.2)))
        ),
    )
    assert_as_without(net, [1, 2, 3], policy, overlap)


def test_modules_that_are_checkpointed_by_hooks_are_as_without() -> None:
    composable = pytest.importorskip("torch.distributed._composable")
    net = nn.Sequential(conv(3, 4), *[nn.Sequential(conv(4, 4), nn.Tanh(), PreAct()) for _ in range(2)], conv(4, 4))
    pair, results = views(), []
    for policy in (False, True, nn.Conv2d, nn.Tanh):
        torch.manual_seed(0)
        model = wrap(copy.deepcopy(net), [1, 2, 3], policy, overlap=0)
        composable.checkpoint(model.backbone[1])
        model.local_step(*pair)
        results.append(gradients(model.backbone))
    for found in results[1:]:
        assert_same(found, results[0])


def test_a_run_ends_where_a_container_begins_that_checkpoints_itself() -> None:
    net = nn.Sequential(conv(3, 4), Mine(nn.BatchNorm2d(4, track_running_stats=False), nn.Tanh(), PreAct()), conv(4, 4))
    assert not any({"0", "1.0"} <= set(run) for run in runs(net, ["2"], True, torch.rand(2, 3, 8, 8)))
    assert_as_without(net, [1, 2])


class PartlyMine(nn.Module):
    """One function that is checkpointed begins in the middle of what would be a run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act, self.top = conv(3, 4), nn.GroupNorm(2, 4), nn.Tanh(), conv(4, 4)
        self.mine = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.mine and self.training:
            x = checkpoint(lambda x: self.act(self.norm(x)), x, use_reentrant=False)
        else:
            x = self.act(self.norm(x))
        return self.top(x)


def test_a_function_of_the_users_that_tears_a_run_apart_is_refused() -> None:
    model = wrap(PartlyMine(), ["act", "top"], True)
    with pytest.raises(RuntimeError, match="a function that the backbone checkpoints itself begins between the two"):
        model.local_step(*views())
    model.backbone.mine = False
    model.zero_grad()
    model.local_step(*views())


def test_a_stage_that_ends_inside_of_a_checkpointed_function_is_refused_by_its_name() -> None:
    model = wrap(nn.Sequential(conv(3, 4), Mine(PreAct(), PreAct()), conv(4, 4)), ["1.0", "2"], False)
    with pytest.raises(
        RuntimeError, match=r"stage 0 ends after '1.0', inside of a function that the backbone checkpoints"
    ):
        model.local_step(*views())


# ---------------------------------------------------------------- state


class Momentum(nn.Module):
    """A frozen copy of the weights that follows them: it equals them at first, so that the first step changes nothing."""

    def __init__(self, every: int = 1, *, by_data: bool = False) -> None:
        super().__init__()
        self.conv = conv(4, 4)
        self.average = copy.deepcopy(self.conv).requires_grad_(False)
        self.every, self.by_data, self.steps = every, by_data, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.steps % self.every == self.every - 1:
            for ours, theirs in zip(self.average.parameters(), self.conv.parameters(), strict=True):
                if self.by_data:
                    ours.data.lerp_(theirs.data, 0.5)
                else:
                    with torch.no_grad():
                        ours.lerp_(theirs, 0.5)
        return self.conv(x).tanh() * self.average(x)


class CountsByData(nn.Module):
    """A counter in a buffer, written without a new version."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(4, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.counts = False

    def forward(self, x: Tensor) -> Tensor:
        if self.counts:
            self.calls.data.add_(1)
        return self.conv(x).tanh() * (1 + self.calls)


class SeenFromTwoSides(nn.Module):
    """A buffer that is a view of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(4, 4)
        self.register_buffer("both", torch.ones(2, 4, 1, 1))
        self.register_buffer("mean", self.both[0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        with torch.no_grad():
            self.both.mul_(0.7).add_(x.detach().abs().mean((0, 2, 3)).view(4, 1, 1), alpha=0.3)
        return (x / (0.1 + self.mean.clone())).tanh()


class SharedBuffer(nn.Module):
    """Two submodules that hold one and the same moving average."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.other = conv(4, 4), Average(), Average()
        self.other.register_buffer("average", self.one.average)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(self.conv(x)).tanh())


class Average(nn.Module):
    """Divides by a moving average, wherever that is kept."""

    def __init__(self, kept: str = "buffer") -> None:
        super().__init__()
        average = torch.ones(1, 4, 1, 1)
        if kept == "buffer":
            self.register_buffer("average", average)
        elif kept == "parameter":
            self.average = nn.Parameter(average, requires_grad=False)
        else:
            self.average = average

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.mul_(0.7).add_(x.detach().abs().mean((0, 2, 3), keepdim=True), alpha=0.3)
        return x / self.average.clone()


class AverageByData(Average):
    """Its parameter changes without a new version."""

    def forward(self, x: Tensor) -> Tensor:
        self.average.data.mul_(0.7).add_(x.detach().abs().mean((0, 2, 3), keepdim=True), alpha=0.3)
        return x / self.average


class NormalisesItsWeight(nn.Module):
    """A weight that is trained, and that every forward changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.conv.weight.mul_(0.9)
        return self.conv(x).tanh()


class GrowsABuffer(nn.Module):
    """Has its buffer from the first forward on, and replaces it in each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(4, 4)
        self.register_buffer("seen", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.seen = x.detach().mean() if self.seen is None else 0.5 * (self.seen + x.detach().mean())
        return x * (1 + self.seen)


@pytest.mark.parametrize(
    "block",
    [
        SharedBuffer,
        lambda: nn.Sequential(conv(4, 4), Average("buffer"), nn.Tanh()),
        lambda: nn.Sequential(conv(4, 4), Average("parameter"), nn.Tanh()),
        lambda: nn.Sequential(conv(4, 4), AverageByData("parameter"), nn.Tanh()),
        NormalisesItsWeight,
        GrowsABuffer,
        Momentum,
        lambda: Momentum(by_data=True),
        SeenFromTwoSides,
    ],
    ids=[
        *("shared buffer", "buffer", "parameter", "by data", "trained weight", "replaced buffer", "momentum"),
        *("momentum by data", "a view"),
    ],
)
@pytest.mark.parametrize("policy", [True, nn.Sequential, lambda module: not list(module.children())])
def test_registered_state_that_a_forward_changes_is_as_without(block: Callable[[], nn.Module], policy: Any) -> None:
    net = nn.Sequential(conv(3, 4), nn.Sequential(block()), nn.Sequential(block()), conv(4, 4))
    if callable(policy) and not isinstance(policy, type):
        net[1].add_module("more", conv(4, 4))
    assert_as_without(net, [1, 2, 3], policy, steps=3)


@pytest.mark.parametrize("by_data", [False, True])
@pytest.mark.parametrize("begins", ["in training", "in evaluation"])
def test_frozen_weights_that_change_every_other_step_are_as_without(by_data: bool, begins: str) -> None:
    net = nn.Sequential(conv(3, 4), Momentum(2, by_data=by_data), Momentum(2, by_data=by_data), conv(4, 4))
    plain, again = wrap(net, [1, 2, 3], False), wrap(copy.deepcopy(net), [1, 2, 3], Momentum)
    again.load_state_dict(plain.state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (plain, again)]
    for step in range(4):
        pair = views()
        for model, optimizer in zip((plain, again), optimizers, strict=True):
            model.train(begins == "in training" or step > 0)
            optimizer.zero_grad()
            model.local_step(*pair)
            for module in model.modules():
                if isinstance(module, Momentum):
                    module.steps += 1
        assert_same(gradients(again), gradients(plain))
        for optimizer in optimizers:
            optimizer.step()
    assert_same(dict(again.named_parameters()), dict(plain.named_parameters()))


def test_a_buffer_that_is_written_from_the_second_step_on_is_as_without() -> None:
    plain = wrap(nn.Sequential(conv(3, 4), CountsByData(), conv(4, 4)), [0, 1, 2], False)
    again = wrap(copy.deepcopy(plain.backbone), [0, 1, 2], CountsByData)
    again.load_state_dict(plain.state_dict())
    for counts in (False, True, True):
        pair = views()
        for model in (plain, again):
            model.backbone[1].counts = counts
            model.local_step(*pair)
    assert_same(gradients(again), gradients(plain))
    assert plain.backbone[1].calls == again.backbone[1].calls == 2


class AddsLast(nn.Module):
    """Its last operation's weight has its gradient before anything of the module runs again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = conv(4, 4), nn.Parameter(torch.zeros(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).tanh().sin() + self.last


def test_weights_that_are_stepped_as_soon_as_they_can_be_are_no_reason_to_refuse() -> None:
    backbone = nn.Sequential(conv(3, 4), AddsLast(), AddsLast(), conv(4, 4))
    results = []
    for policy in (False, AddsLast):
        torch.manual_seed(0)
        model = wrap(copy.deepcopy(backbone), [1, 2, 3], policy)
        optimizers = {weight: torch.optim.SGD([weight], lr=0.5) for weight in model.parameters()}

        def final(weight: Tensor, optimizers: dict[Tensor, torch.optim.SGD] = optimizers) -> None:
            optimizers[weight].step()
            optimizers[weight].zero_grad()

        for weight in model.parameters():
            weight.register_post_accumulate_grad_hook(final)
        for _ in range(3):
            model.local_step(*views())
        results.append(dict(model.named_parameters()))
    assert_same(results[1], results[0])


class Attends(nn.Module):
    """Attention, which looks whether query, key and value are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return x + mixed.transpose(1, 2).reshape(x.shape).sin()


@pytest.mark.parametrize(
    "policy", [nn.MultiheadAttention, (Attends, nn.MultiheadAttention), (True, nn.MultiheadAttention)]
)
def test_one_tensor_that_is_given_three_times_stays_one(policy: Any) -> None:
    assert_as_without(nn.Sequential(conv(3, 4), Attends(), Attends(), conv(4, 4)), [1, 2, 3], policy)


class Given(nn.Module):
    """Takes what it reads in every way there is, and returns more than one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(4, 4)

    def forward(
        self, x: Tensor, both: tuple[Tensor, int], *, named: dict[str, Tensor], by: float
    ) -> tuple[Tensor, Tensor]:
        first, power = both
        return self.conv(x) * named["y"] + first**power, by * named["y"].sin()


class Gives(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.before = Given(), conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x).mean((2, 3), keepdim=True)
        one, other = self.inner(x, (x, 2), named={"y": y}, by=0.5)
        return one + other


def test_tensors_are_given_by_place_by_name_and_inside_of_containers() -> None:
    assert_as_without(nn.Sequential(conv(3, 4), Gives(), Gives(), conv(4, 4)), [1, 2, 3], (Given, Gives))


class Scales(nn.Module):
    """Two scalars of the same value, and a list into which it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(4, 4)

    def forward(self, x: Tensor, one: Tensor, other: Tensor, extra: list[Tensor]) -> Tensor:
        x = self.conv(x) * one
        extra.append(x.sin())
        return x.tanh() * other.square()


class HasScales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.5))
        self.inner = Scales()

    def forward(self, x: Tensor) -> Tensor:
        extra: list[Tensor] = []
        return self.inner(x, self.one, self.other, extra) + torch.stack(extra).sum(0)


def test_tensors_are_told_apart_by_identity_and_lists_are_the_callers_own() -> None:
    assert_as_without(nn.Sequential(conv(3, 4), HasScales(), HasScales(), conv(4, 4)), [1, 2, 3], Scales)


class Frozen(nn.Parameter):
    """A kind of its own, with an attribute, as quantised weights are."""


class UsesItsKind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(4, 4)
        self.scale = Frozen(torch.ones(4, 1, 1), requires_grad=False)
        self.scale.power = 2

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.scale, Frozen)
        return self.conv(x).sin() * self.scale**self.scale.power


def test_frozen_parameters_keep_their_kind_and_attributes() -> None:
    net = nn.Sequential(conv(3, 4), UsesItsKind(), UsesItsKind(), conv(4, 4))
    model = wrap(net, [1, 2, 3], UsesItsKind)
    model.local_step(*views())
    model.local_step(*views())


class Adapted(nn.Module):
    """A large frozen layer with a small trained one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(64, 64).requires_grad_(False)
        self.small = nn.Sequential(nn.Linear(64, 1), nn.Linear(1, 64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.large(x) + self.small(x)).tanh()


def test_many_frozen_weights_that_do_not_change_are_not_copied() -> None:
    def peak(policy: Any) -> int:
        net = nn.Sequential(*[Adapted() for _ in range(3)])
        model = LocalWrapper(net, [0, 1, 2], 0, lambda c: nn.Identity(), example=torch.rand(2, 64), checkpoint=policy)
        model.local_step(*torch.rand(2, 4, 64))
        return measure(lambda: model.local_step(*torch.rand(2, 4, 64))).peak_bytes

    assert peak(Adapted) <= peak(False) + 64 * 64 * 8 // 2


@pytest.mark.parametrize("by", ["lerp", "assignment"])
def test_many_frozen_weights_that_follow_others_without_a_new_version_are_as_without(by: str) -> None:
    class Follows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(4, 4)
            self.average = copy.deepcopy(self.conv).requires_grad_(False)
            self.ballast = nn.Parameter(torch.zeros(100_000), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            for ours, theirs in zip(self.average.parameters(), self.conv.parameters(), strict=True):
                if by == "lerp":
                    ours.data.lerp_(theirs.data, 0.5)
                else:
                    ours.data = ours.data * 0.5 + theirs.data * 0.5
            return self.conv(x).tanh() * self.average(x)

    net = nn.Sequential(conv(3, 4), Follows(), Follows(), conv(4, 4))
    plain, again = wrap(net, [1, 2, 3], False), wrap(copy.deepcopy(net), [1, 2, 3], Follows)
    again.load_state_dict(plain.state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (plain, again)]
    for _ in range(3):
        pair = views()
        for model, optimizer in zip((plain, again), optimizers, strict=True):
            optimizer.zero_grad()
            model.local_step(*pair)
        assert_same(gradients(again), gradients(plain))
        for optimizer in optimizers:
            optimizer.step()
    assert_same(dict(again.named_parameters()), dict(plain.named_parameters()))


@pytest.mark.parametrize("kind", ["looks", "changes", "before", "backward"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_of_all_modules_see_what_they_would_see(kind: str) -> None:
    net = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.Tanh(), conv(4, 4), nn.BatchNorm2d(4), nn.Tanh(), conv(4, 4))
    seen: list[float] = []

    def output(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(module, nn.BatchNorm2d | nn.Tanh):
            seen.append(float(output.detach().sum()))
            return output * 2 if kind == "changes" else None
        return None

    def before(module: nn.Module, args: Any) -> None:
        if isinstance(module, nn.BatchNorm2d | nn.Tanh):
            seen.append(float(args[0].detach().sum()))

    def backward(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        if isinstance(module, nn.BatchNorm2d | nn.Tanh):
            seen.append(float(grad_output[0].sum()))

    register = {
        "before": lambda: nn.modules.module.register_module_forward_pre_hook(before),
        "backward": lambda: nn.modules.module.register_module_full_backward_hook(backward),
    }.get(kind, lambda: nn.modules.module.register_module_forward_hook(output))
    results, pair = [], views()
    for policy in (False, True):
        model = LocalWrapper(
            copy.deepcopy(net), [2, 5, 6], decoder=lambda c: nn.Flatten(), example=pair[0], checkpoint=policy
        )
        seen.clear()
        with register():
            model.local_step(*pair)
        results.append((list(seen), gradients(model)))
    assert results[0][0]
    assert results[1][0] == pytest.approx(results[0][0])
    assert_same(results[1][1], results[0][1])


@pytest.mark.parametrize("policy", [True, nn.Conv2d])
def test_a_submodule_that_is_gone_is_told(policy: Any) -> None:
    net = nn.Sequential(conv(3, 4), nn.Sequential(conv(4, 4), nn.Tanh(), conv(4, 4), nn.Tanh()), conv(4, 4))
    model = wrap(net, [0, 1, 2], policy)
    net[1] = nn.Sequential(conv(4, 4))
    with pytest.raises(
        ValueError, match=r"has no submodule '1.[12]' any more, as it had when it was wrapped. Wrap it again"
    ):
        model.local_step(*views())


class Masked(nn.Module):
    def __init__(self, draw: Callable[[torch.Size], Tensor]) -> None:
        super().__init__()
        self.conv, self.draw = conv(4, 4), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.draw(x.shape)


class OwnGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.generator = conv(4, 4), torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * torch.bernoulli(torch.full_like(x, 0.9), generator=self.generator)


class Straight(nn.Module):
    """A mask that the gradient has and the output has not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        masked = x * random.random()
        return x.detach() + masked - masked.detach()


class LayerDrop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.more = conv(4, 4), conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.more(x).tanh() if random.random() < 0.5 else x


class CallsAverage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.average = conv(4, 4), Average("attribute")

    def forward(self, x: Tensor) -> Tensor:
        return self.average(self.conv(x))


DRAWS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "numpy": (lambda: Masked(lambda shape: torch.from_numpy(np.random.rand(*shape) < 0.9)), r"numpy\.random"),  # noqa: NPY002
    "python": (lambda: Masked(lambda shape: torch.tensor(random.random())), "Python's random"),
    "own numpy": (lambda: Drawn(np.random.default_rng(0)), r"Drawn\.source"),
    "own python": (lambda: Drawn(random.Random(0)), r"Drawn\.source"),
    "generator": (OwnGenerator, r"OwnGenerator\.generator"),
    "straight through": (Straight, "Python's random"),
    "layer drop": (LayerDrop, "Python's random"),
    "attribute": (CallsAverage, r"Average\.average"),
    "hidden": (lambda: Masked(Hidden().draw), "computes something else"),
}


class Drawn(nn.Module):
    def __init__(self, source: Any) -> None:
        super().__init__()
        self.conv, self.source = conv(4, 4), source

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * float(self.source.random())


class Hidden:
    """State that nothing shows."""

    def __init__(self) -> None:
        self.calls = 0

    def draw(self, shape: torch.Size) -> Tensor:
        self.calls += 1
        return torch.tensor(1.0 + 0.01 * self.calls)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("entry", ["step", "call"])
def test_other_state_is_refused_in_the_first_step(draw: str, entry: str) -> None:
    block, cause = DRAWS[draw]
    net = nn.Sequential(conv(3, 4), block(), block(), conv(4, 4))
    model = wrap(net, [1, 2, 3], type(net[1]))
    random.seed(1)  # layer drop: both draws of the first block below 0.5
    with pytest.raises(RuntimeError, match=rf"'\d' cannot be recomputed: .*{cause}"):
        model.local_step(*views()) if entry == "step" else model(*views())
    assert_plain(net)


class CachesAMask(nn.Module):
    """What is computed once and kept in an attribute, as relative positions are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mask, self.calls, self.last = conv(4, 4), None, 0, None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None or self.mask.shape != x.shape[2:]:
            self.mask = torch.ones(x.shape[2:]).triu()
        self.calls += 1
        x = self.conv(x) * self.mask
        self.last = x.detach()
        return x.tanh()


def test_a_cache_a_counter_and_a_result_that_is_kept_are_no_reason_to_refuse() -> None:
    net = nn.Sequential(conv(3, 4), CachesAMask(), CachesAMask(), conv(4, 4))
    assert_as_without(net, [1, 2, 3], CachesAMask)


def test_random_numbers_that_are_drawn_beside_what_is_recomputed_are_no_reason_to_refuse() -> None:
    net = small_net()
    model = wrap(net, [0, 1, 2], nn.Conv2d)
    net[1].register_forward_pre_hook(lambda *_: random.seed(random.random()))
    model.local_step(*views())


def test_a_second_run_is_compared_once_only() -> None:
    net = nn.Sequential(conv(3, 4), Masked(lambda shape: torch.tensor(2.0)), conv(4, 4))
    model = wrap(net, [0, 1, 2], Masked)
    assert not any(learnt.same for learnt in model._runs.values())
    model.local_step(*views())
    assert all(learnt.same for learnt in model._runs.values())


class ChangesLater(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.changes = conv(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        if self.changes:
            with torch.no_grad():
                self.conv.weight.mul_(0.9)
        return self.conv(x).tanh()


def test_a_weight_that_only_later_steps_change_is_refused() -> None:
    net = nn.Sequential(conv(3, 4), ChangesLater(), conv(4, 4))
    model = wrap(net, [0, 1, 2], ChangesLater)
    model.local_step(*views())
    net[1].changes = True
    with pytest.raises(RuntimeError, match=r"'1' changes its weights \['Conv2d.weight'\] in place, which it did not"):
        model.local_step(*views())


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_parts_are_kept_and_not_recomputed() -> None:
    def block() -> nn.Module:
        return nn.Sequential(conv(4, 4), torch.jit.script(nn.Sequential(nn.BatchNorm2d(4), nn.Tanh())))

    net = nn.Sequential(conv(3, 4), block(), nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.Tanh()), conv(4, 4))
    model = wrap(net, [1, 2, 3], (True, nn.Sequential))
    assert all(run[0].startswith("2") for run in model._runs)
    for _ in range(2):
        model.local_step(*views())
    assert net[1][1].state_dict()["0.num_batches_tracked"] == net[2][1].num_batches_tracked == 2


# ---------------------------------------------------------------- true causes


def test_layer_drop_in_later_steps_is_told_as_what_it_is() -> None:
    class Flag(LayerDrop):
        drops = False
        count = 0

        def forward(self, x: Tensor) -> Tensor:
            Flag.count += self.drops
            x = self.conv(x)
            return x if Flag.count == 2 else self.more(x).tanh()

    net = nn.Sequential(conv(3, 4), Flag(), conv(4, 4))
    model = wrap(net, [0, 1, 2], Flag)
    model.local_step(*views())
    Flag.drops = True
    with pytest.raises(RuntimeError, match=r"did something else than in the forward.*layer drop"):
        model.local_step(*views())
    assert_plain(net)


def test_a_checkpoint_of_the_users_that_begins_in_place_fails_as_in_plain_training() -> None:
    model = wrap(nn.Sequential(conv(3, 4), Mine(nn.ReLU(inplace=True), conv(4, 4)), conv(4, 4)), [0, 1, 2], False)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|a leaf Variable that requires grad"):
        model.local_step(*views())


def test_a_cache_of_parametrizations_is_named() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.sin() * 2

    net = nn.Sequential(conv(3, 4), nn.Sequential(conv(4, 4), nn.Tanh()), conv(4, 4))
    parametrize.register_parametrization(net[1][0], "weight", Doubled())
    model = wrap(net, [0, 1, 2], nn.Sequential)
    model.local_step(*views())
    with parametrize.cached(), pytest.raises(RuntimeError, match=r"a cache such as parametrize.cached\(\)"):
        model.local_step(*views())


# ---------------------------------------------------------------- nothing is left behind


def assert_plain(backbone: nn.Module) -> None:
    for module in backbone.modules():
        assert not {"forward", "_compiled_call_impl"} & module.__dict__.keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_two_threads_with_wrappers_of_one_backbone_leave_it_plain() -> None:
    backbone = nn.Sequential(conv(3, 4), *[nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(3)])
    kept = dict(backbone.named_buffers())
    models = [wrap(backbone, [1, 2, 3], policy, overlap) for overlap in (0, 1) for policy in (True, nn.Sequential)]
    start, failures = threading.Barrier(len(models)), list[BaseException]()

    def work(model: LocalWrapper) -> None:
        try:
            start.wait()
            for _ in range(15):
                model.local_step(*views())
        except BaseException as error:  # noqa: BLE001 - whatever it is, the main thread shows it
            failures.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert_plain(backbone)
    assert all(backbone.get_buffer(name) is buffer for name, buffer in kept.items())
    pickle.loads(pickle.dumps(backbone))


@pytest.mark.parametrize("at", range(0, 60, 3))
def test_an_interrupt_anywhere_leaves_the_backbone_plain(at: int) -> None:
    net = nn.Sequential(conv(3, 4), nn.Sequential(conv(4, 4), nn.BatchNorm2d(4)), conv(4, 4))
    kept = dict(net.named_buffers())
    model = wrap(net, [0, 1, 2], True)
    calls = 0

    class Interrupts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal calls
            calls += 1
            if calls > at:
                raise KeyboardInterrupt
            return func(*args, **(kwargs or {}))

    with pytest.raises(KeyboardInterrupt), Interrupts():
        model.local_step(*views())
    assert_plain(net)
    assert all(net.get_buffer(name) is buffer for name, buffer in kept.items())
    model.zero_grad()
    model.local_step(*views())


class Remembers(nn.Module):
    """Keeps what it has seen, as a cache of keys does, and fails where that has another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(4, 4), {}

    def forward(self, x: Tensor) -> Tensor:
        known = torch.cat([self.seen["x"], x]) if "x" in self.seen else x
        self.seen["x"] = known.detach()
        return self.linear(x) + known


def test_what_does_not_run_a_second_time_is_told_with_what_it_said() -> None:
    net = nn.Sequential(nn.Linear(4, 4), Remembers(), nn.Linear(4, 4))
    net[1].seen = {}
    model = LocalWrapper(net, [0, 2], decoder=MLPDecoder, checkpoint=Remembers, example=torch.rand(1, 4))
    net[1].seen.clear()
    with pytest.raises(
        RuntimeError, match=r"'1' cannot be recomputed: its forward ran once.*size of tensor.*use_cache=False"
    ):
        model.local_step(*torch.rand(2, 4, 4))
