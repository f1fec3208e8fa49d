"""What users put on a backbone keeps working in a local pass: hooks on backwards, contexts, hooks on weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import assert_same, gradients, oracle
from test_local_pass import ENTRIES, PLANS
from torch import Tensor, nn
from zoo import Chain, conv, small_net

from locallearn import LocalWrapper, MLPDecoder, Plan, Unit
from locallearn.testing import assert_local_gradients

ABC = ["a", "b", "c"]
Seen = dict[str, list[tuple[Tensor | None, Tensor]]]


def views(size: int = 8) -> tuple[Tensor, ...]:
    return torch.randn(2, 4, 3, size, size).unbind()


def wrap(backbone: nn.Module, stages: Any, **options: Any) -> LocalWrapper:
    return LocalWrapper(backbone, stages, **{"decoder": MLPDecoder, "example": torch.rand(2, 3, 8, 8), **options})


def deep_net() -> nn.Sequential:
    return nn.Sequential(*[nn.Sequential(conv(3 if at == 0 else 4, 4), nn.Tanh(), conv(4, 4)) for at in range(3)])


# ---------------------------------------------------------------- hooks on the backward of a module


def greedy(model: LocalWrapper, pair: tuple[Tensor, ...]) -> None:
    """Greedy InfoMax as one would write it: every stage begins at a detached leaf."""
    features = torch.cat(pair)
    for at, stage in enumerate(model.backbone.children()):
        features = stage(features if at == 0 else features.detach().requires_grad_())
        model.loss(*model.decoders[at](features).chunk(2)).backward()


def watch(net: nn.Module, names: list[str], back: Callable[[Tensor], Tensor] | None = None) -> Seen:
    seen: Seen = {name: [] for name in names}

    def hook(name: str) -> Any:
        def note(module: nn.Module, grad_input: tuple[Tensor | None, ...], grad_output: tuple[Tensor, ...]) -> Any:
            seen[name].append((grad_input[0], grad_output[0]))
            return None if back is None or grad_input[0] is None else (back(grad_input[0]),)

        return note

    for name in names:
        net.get_submodule(name).register_full_backward_hook(hook(name))
    return seen


@pytest.mark.parametrize("checkpoint", [False, True, nn.Sequential, nn.Conv2d])
@pytest.mark.parametrize("back", [None, lambda g: g.clamp(-1e-3, 1e-3)], ids=["looks", "clips"])
@pytest.mark.parametrize(
    "names", [["1", "2"], ["1.0", "2.0"], ["0.2", "1.2", "1.1", "2.2"]], ids=["stages", "first", "last"]
)
def test_hooks_on_backwards_see_and_change_what_they_do_in_plain_greedy_training(
    names: list[str], back: Callable[[Tensor], Tensor] | None, checkpoint: Any
) -> None:
    model, pair = wrap(deep_net(), [0, 1, 2], overlap=0, checkpoint=checkpoint), views()
    plain = copy.deepcopy(model)
    expected, seen = watch(plain.backbone, names, back), watch(model.backbone, names, back)
    for _ in range(2):
        greedy(plain, pair)
        model.local_step(*pair)
    assert_same(gradients(model), gradients(plain))
    assert all(len(calls) == 2 for calls in seen.values())
    for name in names:
        for ours, theirs in zip(seen[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # stage 0 has images for its input
@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan != "overlap 3"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_hooks_that_are_linear_give_the_oracles_gradients(plan: str, entry: str) -> None:
    model, pair = wrap(deep_net(), [0, 1, 2], plan=PLANS[plan](3)), views()
    watch(model.backbone, ["0", "0.2", "1", "1.0", "1.1", "2", "2.2"], lambda g: 0.5 * g)
    for module in model.backbone.modules():
        module.register_full_backward_pre_hook(lambda module, grad_output: (grad_output[0] * 2,))
    expected = oracle(model, *pair)[1]
    ENTRIES[entry](model, *pair)
    assert_same(gradients(model), expected)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_hook_on_a_shared_stage_sees_what_is_walked_through_it_and_then_the_sum() -> None:
    model, pair = wrap(deep_net(), [0, 1, 2], overlap=1), views()
    alone: list[Tensor] = []
    for unit in model.plan.units:  # unit by unit, each on a copy
        single = copy.deepcopy(model)
        seen = watch(single.backbone, ["1"])
        single = wrap(single.backbone, [0, 1, 2], plan=Plan(3, [unit]), decoder=[model.decoders[len(alone)]])
        single.local_step(*pair)
        alone.append(seen["1"][-1][1])
    seen = watch(model.backbone, ["1"])
    model.local_step(*pair)
    assert len(seen["1"]) == 2
    torch.testing.assert_close(seen["1"][0][1], alone[0])
    torch.testing.assert_close(seen["1"][1][1], alone[0] + alone[1])


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of stage 0, whose input are the images
def test_hooks_of_all_modules_are_seen_too() -> None:
    model, pair, names = wrap(deep_net(), [0, 1, 2], overlap=0, decoder=lambda c: nn.Flatten()), views(), list[str]()
    handle = nn.modules.module.register_module_full_backward_hook(
        lambda module, grad_input, grad_output: names.append(type(module).__name__)
    )
    with handle:
        model.local_step(*pair)
    assert names.count("Conv2d") == 6


def test_a_pass_that_only_evaluates_calls_no_hook() -> None:
    model = wrap(deep_net(), [0, 1, 2])
    seen = watch(model.backbone, ["0", "1", "2"])
    with torch.no_grad():
        model(*views())
    assert not any(seen.values())


def test_a_backbone_with_hooks_on_backwards_is_plain_after_a_pass() -> None:
    net = deep_net()
    watch(net, ["1", "1.2"])
    model = wrap(net, [0, 1, 2])
    model.local_step(*views())
    assert not any("_compiled_call_impl" in module.__dict__ or module._forward_hooks for module in net.modules())


# ---------------------------------------------------------------- modes of the backbone's own


class NoGrad(Chain):
    """Runs its first stage without gradients, over the cut behind it."""

    def __init__(self, context: Callable[[bool], AbstractContextManager[object]]) -> None:
        super().__init__()
        self.stem, self.context = conv(3, 4), context

    def forward(self, x: Tensor) -> Tensor:
        with self.context(self.training):
            x = self.a(self.stem(x))
        return self.c(self.b(x))


CONTEXTS: dict[str, Callable[[bool], AbstractContextManager[object]]] = {
    "no_grad": lambda training: torch.no_grad(),
    "set_grad_enabled": lambda training: torch.set_grad_enabled(False),
    "not in evaluation": lambda training: torch.set_grad_enabled(not training),
    "only in training": lambda training: torch.no_grad() if training else nullcontext(),
    "always, only in training": lambda training: torch.enable_grad() if training else nullcontext(),
    "only in evaluation": torch.set_grad_enabled,
    "always": lambda training: torch.enable_grad(),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(
    "plan",
    [
        Plan(3, [Unit(1, 2)]),
        Plan(3, [Unit(2, 2)]),
        Plan(3, [Unit(0, 0), Unit(2, 2)]),
        Plan(3, [Unit(0, 2, [0, 2])]),
        Plan.windows(3, 0),
        Plan.windows(3, 1),
    ],
    ids=["(1, 2)", "(2, 2)", "0 and 2", "gap", "overlap 0", "overlap 1"],
)
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_context_that_spans_a_cut_leaves_the_next_stage_its_gradient(context: str, plan: Plan, entry: str) -> None:
    model, pair = wrap(NoGrad(CONTEXTS[context]), ABC, plan=plan), views()
    expected = oracle(model, *pair)[1]
    ENTRIES[entry](model, *pair)
    assert_same(gradients(model), expected)


class SpansTwo(Chain):
    """Runs two stages without gradients, or with, when it trains."""

    def __init__(self, context: Callable[[], AbstractContextManager[object]]) -> None:
        super().__init__()
        self.d, self.context = conv(4, 4), context

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.stem(x))
        with self.context() if self.training else nullcontext():
            x = self.c(self.b(x))
        return self.d(x)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, partial(torch.set_grad_enabled, False)])
@pytest.mark.parametrize(
    "units",
    [
        [Unit(0, 0), Unit(2, 3)],
        [Unit(2, 2)],
        [Unit(2, 3)],
        [Unit(3, 3)],
        [Unit(0, 3, [0, 3])],
        [Unit(1, 1), Unit(3, 3)],
    ],
    ids=str,
)
def test_a_context_over_two_stages_is_as_in_plain_training(context: Any, units: list[Unit]) -> None:
    model, pair = wrap(SpansTwo(context), ["a", "b", "c", "d"], plan=Plan(4, units)), views()
    expected = oracle(model, *pair)[1]
    model.local_step(*pair)
    assert_same(gradients(model), expected)


class HandsOn(Chain):
    """Ends a stage inside of a ``no_grad`` that does nothing: its outlet has a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.end = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.stem(x))
        with torch.no_grad():
            x = self.end(x)
        return self.c(self.b(x))


@pytest.mark.parametrize("overlap", [0, 1, 2])
@pytest.mark.parametrize("entry", ENTRIES)
def test_an_outlet_with_a_graph_is_walked_through_whatever_is_set_around_it(overlap: int, entry: str) -> None:
    model, pair = wrap(HandsOn(), ["end", "b", "c"], overlap=overlap), views()
    expected = oracle(model, *pair)[1]
    assert "backbone.a.weight" in expected
    ENTRIES[entry](model, *pair)
    assert_same(gradients(model), expected)


class InInference(Chain):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            x = self.a(self.stem(x))
        return self.c(self.b(x.clone()))


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("checkpoint", [False, True, nn.Conv2d])
def test_a_decoder_at_a_cut_in_inference_mode_is_trained(overlap: int, checkpoint: Any) -> None:
    net = InInference()
    plain = copy.deepcopy(net)
    model, pair = wrap(net, ["stem", "a", "c"], overlap=overlap, checkpoint=checkpoint), views()
    assert_local_gradients(model, *pair)
    model.local_step(*pair)
    features = plain.a(plain.stem(torch.cat(pair))).detach()
    decoders = copy.deepcopy(model.decoders)
    decoders.zero_grad()
    model.loss(*decoders[1 - overlap](features).chunk(2)).backward()
    assert_same(gradients(model.decoders[1 - overlap]), gradients(decoders[1 - overlap]))
    assert net.stem.weight.grad is None


class NoGradAbove(Chain):
    """Runs its second stage without gradients, though a unit wants to train it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.stem(x))
        with torch.no_grad():
            x = self.b(x)
        return self.c(x)


@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_what_the_backbone_runs_without_gradients_gets_none(overlap: int) -> None:
    model, pair = wrap(NoGradAbove(), ABC, overlap=overlap), views()
    expected = oracle(model, *pair)[1]
    model.local_step(*pair)
    assert_same(gradients(model), expected)
    assert model.backbone.b.weight.grad is None


def test_the_mode_of_the_caller_is_the_same_after_a_pass() -> None:
    model = wrap(NoGrad(CONTEXTS["no_grad"]), ABC, plan=Plan(3, [Unit(1, 1)]))
    model.local_step(*views())
    assert torch.is_grad_enabled()
    with torch.no_grad():
        model(*views())
        assert not torch.is_grad_enabled()


# ---------------------------------------------------------------- hooks on weights


def test_hooks_of_weights_without_a_gradient_are_not_called() -> None:
    net = nn.Sequential(*small_net(), nn.Flatten(), nn.Linear(4 * 64, 5))
    model, pair, called = wrap(net, [0, 1, 2]), views(), list[Tensor | None]()
    for weight in net.parameters():
        weight.register_hook(lambda g: (called.append(g), g.clamp(-1, 1))[1])
    model(*pair).backward()
    assert len(called) == len(list(net[:3].parameters()))
    assert all(gradient is not None for gradient in called)
    assert net[4].weight.grad is None


def test_hooks_of_weights_without_a_gradient_get_zeros_where_every_weight_is_waited_for() -> None:
    net = nn.Sequential(*small_net(), nn.Flatten(), nn.Linear(4 * 64, 5))
    model, called = wrap(net, [0, 1, 2]), list[Tensor | None]()
    net[4].weight.register_hook(lambda g: (called.append(g), g.clamp(-1, 1))[1])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            ddp(*views()).backward()
    finally:
        dist.destroy_process_group()
    assert len(called) == 2
    assert all(gradient is not None and not gradient.any() for gradient in called)


def test_a_pass_in_which_no_weight_has_a_gradient_can_still_be_differentiated() -> None:
    model = wrap(small_net(), [0, 1, 2], loss=lambda a, b: (a * b).sum() * 0)
    model.backbone.requires_grad_(False)
    model.decoders.requires_grad_(False)
    model.backbone[2].weight.requires_grad_(True)
    model(*views()).backward()
