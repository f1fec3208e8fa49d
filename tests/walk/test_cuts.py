"""Hooks are on while a forward runs in the thread that asked for it, and off afterwards."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn
from zoo import Chain, small_net

from locallearn._walk.cuts import check_order, find, hooked


def test_names_are_found_whatever_form_they_come_in() -> None:
    backbone = nn.Sequential(small_net(), Chain())
    assert find(backbone, ["0.1", "1.stem", "1"]) == ("0.1", "1.stem", "1")
    assert find(backbone, [backbone[0][1], backbone[1].stem]) == ("0.1", "1.stem")  # type: ignore[index, list-item]
    assert find(backbone, (0, -1)) == ("0", "1")


def test_the_forward_goes_on_with_what_the_hook_returns() -> None:
    backbone, images = small_net(), torch.rand(1, 3, 4, 4)
    seen: list[int] = []

    def double(stage: int, output: Tensor) -> Tensor:
        seen.append(stage)
        return output * 2

    with hooked([backbone[0], backbone[2]], double):
        ours = backbone(images)
    assert seen == [0, 2 - 1]
    torch.testing.assert_close(ours, 2 * backbone[2](backbone[1](2 * backbone[0](images))))


def test_hooks_are_gone_after_an_exception() -> None:
    backbone = small_net()

    def fail(stage: int, output: Tensor) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError), hooked([backbone[0]], fail):
        backbone(torch.rand(1, 3, 4, 4))
    assert not backbone[0]._forward_hooks


def test_what_the_hook_runs_itself_and_other_threads_are_left_alone() -> None:
    backbone, images = small_net(), torch.rand(1, 3, 4, 4)
    plain = backbone(images)
    inside: list[Tensor] = []

    def look(stage: int, output: Tensor) -> Tensor:
        inside.append(backbone(images))
        thread = threading.Thread(target=lambda: inside.append(backbone(images)))
        thread.start()
        thread.join()
        return output * 0

    with hooked([backbone[0]], look):
        thread = threading.Thread(target=lambda: inside.append(backbone(images)))
        thread.start()
        thread.join()
        assert len(inside) == 1
        backbone(images)
    assert len(inside) == 3
    assert all(torch.equal(output, plain) for output in inside)


@pytest.mark.parametrize(
    ("ran", "message"),
    [
        ([0, 2], r"never ran in a forward: \['b'\]"),
        ([0, 1, 1, 2], r"more than once in a forward: \['b'\]"),
        ([0, 2, 1], r"stages=\['a', 'c', 'b'\]; got \['a', 'b', 'c'\]"),
    ],
)
def test_order(ran: list[int], message: str) -> None:
    check_order(("a", "b", "c"), [0, 1, 2], Chain())
    with pytest.raises(ValueError, match=message):
        check_order(("a", "b", "c"), ran, Chain())
