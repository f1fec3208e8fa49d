"""Ctrl-C at any line of the library leaves the backbone as it was.

CI tries every seventh line, ``pytest tests/walk/test_interrupts.py --full`` all of them.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from oracle import assert_same, gradients, oracle
from torch import Tensor, nn
from zoo import conv

import locallearn
from locallearn import LocalWrapper, MLPDecoder
from locallearn._fitting.chain import links

OURS = str(Path(locallearn.__file__).parent)
HOOKS = {"register_forward_hook", "register_forward_pre_hook"}  # of torch: an interrupt there loses the handle


class Remembers(nn.Module):
    """Has a buffer and plain attributes that its forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.last: Tensor | None = None
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.conv(x)
        self.seen.append(self.last)
        return self.last


def backbone() -> nn.Sequential:
    net = nn.Sequential(Remembers(), nn.BatchNorm2d(4), conv(4, 4))
    net[1].eval()
    return net


class Interrupted:
    """Raises KeyboardInterrupt when the ``at``-th line of the library, or of torch where it stores a hook, begins."""

    def __init__(self, at: int) -> None:
        self.at, self.lines = at, 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if code.co_name == "<genexpr>" or not (code.co_filename.startswith(OURS) or code.co_name in HOOKS):
            return None  # what is raised in a generator that is freed is lost
        if event in ("call", "line"):
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self


def lines_of(what: Callable[[], object]) -> int:
    counting = Interrupted(-1)
    traced(counting, what)
    return counting.lines


def traced(by: Interrupted, what: Callable[[], object]) -> BaseException | None:
    """What interrupts ``what``; it is handed out, as a notebook would, so that no frame is freed in the meantime."""
    known = sys.gettrace()
    sys.settrace(by)
    try:
        what()
    except KeyboardInterrupt as interrupt:
        return interrupt
    finally:
        sys.settrace(known)
        torch.set_grad_enabled(True)  # torch's own contexts are not ours to mend
    return None


def assert_plain(net: nn.Sequential, modes: list[bool], state: dict[str, Tensor], *, training: bool = False) -> None:
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_pre_hooks_with_kwargs
        assert not {"forward", "_compiled_call_impl"} & module.__dict__.keys()
    assert [module.training for module in net.modules()] == modes
    if not training:
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
        assert net[0].last is None
        assert net[0].seen == []
        pickle.dumps(net)


def wrapping(net: nn.Module, checkpoint: Any = False) -> Callable[[], object]:
    example = torch.zeros(2, 3, 4, 4)
    return lambda: LocalWrapper(net, ["0", "2"], decoder=MLPDecoder, example=example, checkpoint=checkpoint)


def looking(net: nn.Module) -> Callable[[], object]:
    return lambda: links(net, torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize("what", [wrapping, looking])
def test_an_interrupt_while_wrapping(what: Callable[[nn.Module], Callable[[], object]], full: bool) -> None:
    total = lines_of(what(backbone()))
    assert total > 100
    for at in range(1, total + 1, 1 if full else 7):
        net = backbone()
        modes, state = (
            [module.training for module in net.modules()],
            {k: v.clone() for k, v in net.state_dict().items()},
        )
        interrupt = traced(Interrupted(at), what(net))
        assert interrupt is not None
        assert_plain(net, modes, state)


@pytest.mark.parametrize("entry", ["local_step", "forward"])
@pytest.mark.parametrize("checkpoint", [False, (Remembers, nn.BatchNorm2d)])
def test_an_interrupt_in_a_step(entry: str, checkpoint: Any, full: bool) -> None:
    net = backbone()
    kept = dict(net.named_buffers())
    model = wrapping(net, checkpoint)()
    assert isinstance(model, LocalWrapper)
    pair = torch.rand(2, 2, 3, 4, 4).unbind()
    modes = [module.training for module in net.modules()]
    handle = net[2].weight.register_hook(lambda gradient: gradient)
    getattr(model, entry)(*pair)
    total = lines_of(lambda: getattr(model, entry)(*pair))
    assert total > 100
    for at in range(1, total + 1, 1 if full else 7):
        interrupt = traced(Interrupted(at), lambda: getattr(model, entry)(*pair))
        assert interrupt is not None or at > total - 50  # the lines of a step vary a little
        assert_plain(net, modes, {}, training=True)
        assert all(net.get_buffer(name) is buffer for name, buffer in kept.items())
        assert net[2].weight._backward_hooks
    handle.remove()
    net[0].last, net[0].seen = None, []
    model.zero_grad()
    expected = oracle(model, *pair)[1]
    model.local_step(*pair)
    assert_same(gradients(model), expected)
