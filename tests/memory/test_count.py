"""Counts are exact: compared with figures worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18

from locallearn import InfoNCE
from locallearn.memory import Cost, measure

KB = 1024


def square(side: int) -> Tensor:
    return torch.zeros(side, side, dtype=torch.float32)


def test_flops_of_a_product_and_its_backward() -> None:
    a, b = (square(32).requires_grad_() for _ in range(2))
    assert measure(lambda: a @ b).flops == 2 * 32**3
    assert measure(lambda: (a @ b).sum().backward()).flops == 3 * 2 * 32**3


def test_flops_agree_with_torchs_counter() -> None:
    model, images = resnet18(), torch.rand(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    assert measure(lambda: model(images).sum().backward()).flops == counter.get_total_flops()


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("groups", [1, 4])
def test_both_gradients_of_a_convolution_cost_what_its_forward_does(groups: int, kind: type[nn.Conv2d]) -> None:
    layer, images = kind(8, 8, 3, stride=2, groups=groups), torch.rand(2, 8, 9, 9, requires_grad=True)
    forward = measure(lambda: layer(images)).flops
    pixels = 4 * 4 if kind is nn.Conv2d else 9 * 9
    assert forward == 2 * (2 * 8 * 8 // groups) * 9 * pixels
    assert measure(lambda: layer(images).sum().backward()).flops == 3 * forward
    assert measure(lambda: layer(images.detach()).sum().backward()).flops == 2 * forward


@pytest.mark.parametrize(
    ("options", "products"),
    [
        ({"tile": 0}, 4 + 8),  # the whole (2N)^2 similarity, and its gradient twice
        ({"tile": 64}, 3 + 3 + 4),  # its upper half, that again, and one product for each side of a tile that moves
        ({"tile": 64, "form": "one-way"}, 1 + 1 + 2),
    ],
)
def test_flops_of_infonce(options: dict[str, Any], products: int) -> None:
    a, b = (torch.rand(64, 16, dtype=torch.float32, requires_grad=True) for _ in range(2))
    assert measure(lambda: InfoNCE(**options)(a, b).backward()).flops == products * 2 * 64 * 64 * 16


def test_peak_counts_what_is_alive_at_once() -> None:
    side = 16  # a matrix of it is 1 KiB

    def step() -> None:
        first = square(side) + 1  # zeros and the sum: 2 KiB
        del first
        second = [square(side) for _ in range(3)]  # 3 KiB
        del second

    assert measure(step).peak_bytes == 3 * KB


def test_tensors_from_before_do_not_count() -> None:
    known = square(16)
    assert measure(lambda: known.add_(1).view(-1)) == Cost(0, 0, 0)


def test_views_and_shared_storage_count_once() -> None:
    assert measure(lambda: square(16).view(-1)[::2].clone().expand(4, 128)).peak_bytes == int(1.5 * KB)


def test_saved_bytes_count_each_tensor_once_and_until_it_is_freed() -> None:
    weight = square(16).requires_grad_()

    def once() -> Tensor:
        x = square(16) * 2  # not saved: nothing here needs a gradient
        y = (x * weight).sigmoid()  # saves x, and y as the result
        return (y * y).sum()  # saves y, twice

    assert measure(lambda: once().backward()).saved_bytes == 2 * KB

    def twice() -> None:
        once().backward()
        once().backward()

    assert measure(twice).saved_bytes == 2 * KB

    def together() -> None:
        loss = once() + once()
        loss.backward()

    assert measure(together).saved_bytes == 4 * KB


def test_checkpointing_is_seen() -> None:
    weight = square(16).requires_grad_()

    def chain(x: Tensor) -> Tensor:
        for _ in range(8):
            x = (x * weight).sigmoid()
        return x

    def twice(x: Tensor, *, recompute: bool) -> Tensor:
        for _ in range(2):
            x = checkpoint(chain, x, use_reentrant=False) if recompute else chain(x)
        return x.sum()

    assert measure(lambda: twice(square(16), recompute=False).backward()).saved_bytes == 17 * KB
    assert measure(lambda: twice(square(16), recompute=True).backward()).saved_bytes < 12 * KB


@pytest.mark.parametrize("batch", [2, 8])
def test_fake_tensors_give_the_same_counts_as_real_ones(batch: int) -> None:
    def count() -> Cost:
        torch.set_default_dtype(torch.float32)
        model, images = resnet18(), torch.zeros(batch, 3, 32, 32)
        model(images).sum().backward()
        return measure(lambda: model(images).sum().backward())

    real = count()
    with FakeTensorMode():
        assert count() == real
