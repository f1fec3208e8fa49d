"""benchmarks/rivals.py: every way to train end to end has one gradient, and every way to train LoCo another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

pytest.importorskip("matplotlib", reason="the examples need the extra `examples`")
import rivals
from networks import NETWORKS
from oracle import assert_same, gradients, oracle
from rivals import Net

from locallearn import LocalWrapper, MLPDecoder
from locallearn.memory import Cost, measure


def block(before: int, after: int, norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), norm(after), nn.ReLU(inplace=True))


def wrapped(overlap: int, norm: type[nn.Module] = nn.BatchNorm2d) -> LocalWrapper:
    stages = [nn.Sequential(block(3 if s == 0 else 4, 4, norm), block(4, 4, norm)) for s in range(5)]
    return LocalWrapper(nn.Sequential(*stages), range(5), overlap, MLPDecoder, example=torch.zeros(2, 3, 8, 8))


def plain(model: LocalWrapper) -> Net:
    return Net([list(stage) for stage in model.backbone], model.decoders, model.plan)  # type: ignore[arg-type]


def views(number: int = 6) -> tuple[Tensor, ...]:
    return torch.rand(2, number, 3, 8, 8).unbind()


def assert_equal_to_local_step(step: Callable[..., None], model: LocalWrapper, *pair: Tensor) -> None:
    ours = copy.deepcopy(model)
    ours.local_step(*pair)
    step(plain(model), torch.cat(pair))
    assert_same(gradients(model), gradients(ours))


@pytest.mark.parametrize("overlap", [0, 1, 2, 4])
@pytest.mark.parametrize("step", [rivals.forward_per_window, rivals.doubled_backward])
def test_local_rivals_have_the_gradients_of_local_step(step: Callable[..., None], overlap: int) -> None:
    assert_equal_to_local_step(step, wrapped(overlap), *views())


def test_local_step_by_hand_has_its_gradients() -> None:
    assert_equal_to_local_step(rivals.by_hand, wrapped(1), *views())


@pytest.mark.parametrize(
    "step", [rivals.end_to_end, rivals.blocks_recomputed, rivals.stages_recomputed, rivals.offloaded]
)
def test_end_to_end_rivals_have_the_gradients_of_the_widest_overlap(step: Callable[..., None]) -> None:
    assert_equal_to_local_step(step, wrapped(4), *views())


@pytest.mark.parametrize("size", [1, 5, 12])  # of 12 views
def test_gradient_caching_has_the_gradient_of_the_whole_batch(size: int) -> None:
    assert_equal_to_local_step(
        partial(rivals.gradient_caching, size=size), wrapped(4, lambda width: nn.GroupNorm(2, width)), *views()
    )


def test_recomputed_local_step_has_the_gradients_of_the_plain_one() -> None:
    model, pair = wrapped(1), views()
    again = LocalWrapper(
        copy.deepcopy(model.backbone),
        range(5),
        1,
        copy.deepcopy(list(model.decoders)),
        checkpoint=True,
        example=pair[0],
    )
    again.local_step(*pair)
    assert_same(gradients(again), oracle(model, *pair)[1])


def test_a_forward_per_window_updates_the_statistics_of_shared_stages_twice() -> None:
    model = wrapped(1)
    rivals.forward_per_window(plain(model), torch.cat(views()))
    assert [int(stage[0][1].num_batches_tracked) for stage in model.backbone] == [1, 2, 2, 2, 1]  # type: ignore[index]


def count(step: Callable[..., None] | None, overlap: int) -> Cost:
    """Of `local_step`, if no other step is given."""
    torch.set_default_dtype(torch.float32)
    fake, model = FakeTensorMode(), wrapped(overlap)
    with FakeCopyMode(fake):
        model = copy.deepcopy(model)
    with fake:
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        images = torch.zeros(12, 3, 8, 8)
        return measure(lambda: step(plain(model), images) if step else model.local_step(*images.chunk(2)))


def test_ours_computes_less_than_the_doubled_backward_and_that_less_than_a_forward_per_window() -> None:
    ours, by_hand, doubled, naive = (
        count(step, 1) for step in (None, rivals.by_hand, rivals.doubled_backward, rivals.forward_per_window)
    )
    assert ours.flops == by_hand.flops < doubled.flops < naive.flops


def test_what_is_offloaded_does_not_count_as_the_devices() -> None:
    away, kept = count(rivals.offloaded, 4), count(rivals.end_to_end, 4)
    assert away.flops == kept.flops
    assert away.saved_bytes == 0
    assert away.peak_bytes < kept.peak_bytes / 2


@pytest.mark.parametrize("arch", NETWORKS)
def test_blocks_of_a_network_run_as_its_forward_does(arch: str) -> None:
    torch.set_default_dtype(torch.float32)
    network, outlets = NETWORKS[arch], []
    backbone = network.make(96).eval()
    for name in network.stages:
        backbone.get_submodule(name).register_forward_hook(lambda module, args, output: outlets.append(output))
    images = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        backbone(images)
        features = images
        for stage, outlet in zip(network.blocks(backbone), outlets.copy(), strict=True):
            for part in stage:
                features = part(features)
            torch.testing.assert_close(features, outlet)
