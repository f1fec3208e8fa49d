"""Random backbones for property-based tests: awkward parts, modes, hooks and contexts of their own, cut anywhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

WIDTH = 4


def conv(kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(WIDTH, WIDTH, kernel, padding=kernel // 2, **options)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = conv(3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).tanh()


class PreActivation(nn.Module):
    """Begins with what a run of simple layers could reach into."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.BatchNorm2d(WIDTH), conv(3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x).sin())


class NormAct(nn.Module):
    """Simple layers, and operations of its own behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).sigmoid()


class ActFirst(nn.Module):
    """Operations of its own before and behind a simple layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.cos()) * 0.5


class UsedTwice(nn.Module):
    """One convolution, twice within a stage."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = conv()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(self.inner(x).sigmoid())
        return result


class HalfUsed(nn.Module):
    """A part of the weights never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.used(x)
        return result


class MovingAverage(nn.Module):
    """State that every forward changes: in a buffer, in a frozen parameter, or in one buffer under two names."""

    def __init__(self, kept: str = "buffer") -> None:
        super().__init__()
        average = torch.ones(1, WIDTH, 1, 1)
        if kept == "parameter":
            self.average = nn.Parameter(average, requires_grad=False)
        else:
            self.register_buffer("average", average)
        self.inner = MovingAverage() if kept == "twice" else nn.Identity()
        if kept == "twice":
            self.inner.register_buffer("average", self.average)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.mul_(0.7).add_(x.detach().abs().mean((0, 2, 3), keepdim=True), alpha=0.3)
        result: Tensor = self.inner(x / (0.1 + self.average.clone()))
        return result


class Single(nn.Module):
    """Computes in single precision inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = conv(dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x.float()).tanh().to(x.dtype)
        return result


class Checkpointed(nn.Sequential):
    """Recomputes itself, as users' modules do."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return result


class Around(nn.Module):
    """Recomputes what lies inside of it, with operations around."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.before, self.inner = conv(), nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + checkpoint(self.inner, self.before(x).sin(), use_reentrant=False)
        return result


STATELESS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: conv(3, bias=False),
    "grouped": lambda: conv(groups=WIDTH),
    "group norm": lambda: nn.GroupNorm(1, WIDTH),
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "clipped": nn.Hardtanh,
    "identity": nn.Identity,
    "dropout": lambda: nn.Dropout(0.25),
    "shuffle": lambda: nn.ChannelShuffle(2),
    "residual": Residual,
    "pre-activation": PreActivation,
    "norm and act": NormAct,
    "act first": ActFirst,
    "used twice": UsedTwice,
    "half used": HalfUsed,
}
STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm2d(WIDTH),
    "cumulative": lambda: nn.BatchNorm2d(WIDTH, momentum=None),
    "spectral": lambda: spectral_norm(conv(3)),
    "average": MovingAverage,
    "average in a parameter": lambda: MovingAverage("parameter"),
    "average under two names": lambda: MovingAverage("twice"),
    "single": Single,
}
CONTAINERS: dict[str, Callable[..., nn.Module]] = {
    "sequential": nn.Sequential,
    "around": Around,
    "checkpointed": Checkpointed,
}
POLICIES: dict[str, Any] = {
    "nothing": False,
    "natural": True,
    "sequentials": nn.Sequential,
    "both": (True, nn.Sequential),
    "convolutions": nn.Conv2d,
    "all kinds": (True, nn.Conv2d, nn.BatchNorm2d, Residual, PreActivation, NormAct),
    "every leaf": lambda module: not any(module.children()),
    "every container": lambda module: any(module.children()) and not isinstance(module, Net),
}


@dataclass
class Bag:
    """Tensors that torch does not know of."""

    held: list[Tensor]


PACKED: dict[str, Callable[[list[Tensor]], Any]] = {
    "tuple": tuple,
    "list": list,
    "dict": lambda held: dict(enumerate(held)),
    "nested": lambda held: (held[0], None, {"rest": held[1:], "number": 3}),
    "dataclass": Bag,
}


def held(state: Any) -> list[Tensor]:
    """The tensors in whatever :data:`PACKED` makes, or a tensor alone; one that is there twice is listed twice."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, Bag):
        return state.held
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in held(value)]
    return [tensor for value in state for tensor in held(value)] if isinstance(state, list | tuple) else []


WIRINGS: dict[str, Callable[[list[Tensor], int, int, nn.Module], None]] = {
    "one changes": lambda x, i, j, inner: x.__setitem__(i, inner(x[i])),
    "one from another": lambda x, i, j, inner: x.__setitem__(i, inner(x[j])),
    "from two": lambda x, i, j, inner: x.__setitem__(i, inner(x[i] + x[j].sin())),
    "one more": lambda x, i, j, inner: x.append(inner(x[i])),
    "the same again": lambda x, i, j, inner: x.append(x[i]),
    "a view": lambda x, i, j, inner: x.insert(j, x[i].transpose(2, 3)),
    "without a graph": lambda x, i, j, inner: x.append(x[i].detach()),
    "one less": lambda x, i, j, inner: None if len(x) == 1 else x.__delitem__(i),
    "the other way round": lambda x, i, j, inner: x.reverse(),
}


class Wired(nn.Module):
    """Takes several tensors and returns several: ``inner`` changes one of them, and the others are handed through."""

    def __init__(self, inner: nn.Module, wirings: list[tuple[str, int, int]], packed: str) -> None:
        super().__init__()
        self.inner, self.wirings, self.packed = inner, wirings, packed

    def forward(self, state: Any) -> Any:
        tensors = [*held(state)]
        for wiring, i, j in self.wirings:
            WIRINGS[wiring](tensors, i % len(tensors), j % len(tensors), self.inner)
        return PACKED[self.packed](tensors[:4])


def all_of(outlet: Any) -> Tensor:
    """For ``features=``."""
    return torch.cat(held(outlet), 1)


class Net(nn.Sequential):
    """A chain, parts of which run under ``torch.no_grad``.

    Attributes:
        without: pairs of numbers: from which part to which one.
    """

    without: tuple[tuple[int, int], ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        at = 0
        while at < len(self):
            last = next((b for a, b in self.without if a == at), None)
            with nullcontext() if last is None else torch.no_grad():
                for at in range(at, at + 1 if last is None else last + 1):  # noqa: B020 - goes on where it ended
                    x = self[at](x)
            at += 1
        return x


class Drawn(NamedTuple):
    """A backbone, where to cut it, what to recompute, whether it is single inside, and what decoders read."""

    backbone: Net
    cuts: list[int]
    policy: Any
    single: bool
    features: Any


@st.composite
def parts(draw: st.DrawFn, depth: int = 2, stateful: bool = True) -> nn.Module:
    """A module from maps to maps of the same size; what users' own checkpoints hold is stateless."""
    kinds = [*STATELESS, *(STATEFUL if stateful else ()), *(CONTAINERS if depth else ())]
    kind = draw(st.sampled_from(kinds))
    if kind not in CONTAINERS:
        return (STATELESS | STATEFUL)[kind]()
    inner = stateful and kind == "sequential"
    return CONTAINERS[kind](*[draw(parts(depth - 1, inner)) for _ in range(draw(st.integers(1, 3)))])


def _scale(by: float, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
    """What a linear hook on a backward returns; torch allows nothing where no input has a gradient."""
    return None if gradients[0] is None else tuple(None if g is None else by * g for g in gradients)


HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "output": lambda m: m.register_forward_hook(lambda module, args, output: output * 1.5),
    "input": lambda m: m.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,)),
    "looks": lambda m: m.register_forward_hook(lambda module, args, output: None),
    "backward": lambda m: m.register_full_backward_hook(lambda module, back, _: _scale(2.0, back)),
    "before backward": lambda m: m.register_full_backward_pre_hook(lambda module, front: _scale(0.5, front)),
}


@st.composite
def networks(draw: st.DrawFn) -> Drawn:
    """A network of 2 to 6 parts, one to five stages."""
    torch.manual_seed(draw(st.integers(0, 2**16), label="seed"))
    layers = [draw(parts()) for _ in range(draw(st.integers(2, 6)))]
    if draw(st.integers(0, 2), label="passes several tensors") == 0:
        wiring = st.tuples(st.sampled_from(list(WIRINGS)), st.integers(0, 3), st.integers(0, 3))
        layers = [
            Wired(layer, draw(st.lists(wiring, min_size=1, max_size=3)), draw(st.sampled_from(list(PACKED))))
            for layer in layers
        ]
    backbone = Net(*layers)
    size = len(backbone)
    cuts = sorted(draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=5), label="cuts"))
    policy = POLICIES[draw(st.sampled_from(list(POLICIES)), label="policy")]
    modules = [module for name, module in backbone.named_modules() if name and "parametrizations" not in name]
    for at in draw(st.sets(st.integers(0, len(modules) - 1), max_size=2), label="frozen"):
        modules[at].requires_grad_(False)
    for at in draw(st.sets(st.integers(0, len(modules) - 1), max_size=2), label="in eval mode"):
        modules[at].eval()
    if draw(st.integers(0, 3), label="has a context") == 0:
        first = draw(st.integers(0, size - 1), label="from")
        backbone.without = ((first, draw(st.integers(first, size - 1), label="to")),)
    if draw(st.booleans(), label="has hooks"):
        hooked = [module for module in modules if not isinstance(module, Wired)]
        for at in draw(st.sets(st.integers(0, len(hooked) - 1), min_size=1, max_size=3)):
            HOOKS[draw(st.sampled_from(list(HOOKS)), label="hook")](hooked[at])
    single = any(isinstance(module, Single) for module in modules)
    features = draw(st.sampled_from([None, all_of]), label="features")
    return Drawn(backbone, cuts, policy, single, features)
