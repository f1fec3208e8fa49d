"""Where a message says what to do, doing it works; what it says is so."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from oracle import assert_same, gradients, oracle
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, ResNet
from zoo import conv, small_net

from locallearn import LocalWrapper, MLPDecoder, plan_stages


def wrap(backbone: nn.Module, stages: Any, **options: Any) -> LocalWrapper:
    return LocalWrapper(backbone, stages, **{"decoder": MLPDecoder, "example": torch.rand(2, 3, 16, 16), **options})


def assert_right(model: LocalWrapper) -> None:
    pair = torch.rand(2, 4, 3, 16, 16).unbind()
    expected = oracle(model, *pair)[1]
    model.local_step(*pair)
    assert_same(gradients(model), expected)


# ---------------------------------------------------------------- blocks that return more than a tensor


class Block(nn.Module):
    """As in transformers: the parent reads its attributes, and unpacks what it returns."""

    def __init__(self, before: int, scale: float) -> None:
        super().__init__()
        self.conv, self.scale = conv(before, 4), scale

    def forward(self, x: Tensor, bias: float = 0.0) -> tuple[Tensor, Tensor]:
        y = self.conv(x) * self.scale + bias
        return y, y.mean()


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(3, 0.5), Block(4, 2.0), Block(4, 1.5)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block(x, bias=block.scale)  # type: ignore[arg-type]
        return x


BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]


def test_a_block_that_returns_a_tuple_can_end_a_stage_at_a_module_of_its_own() -> None:
    net = Parent()
    keys = list(net.state_dict())

    class Ended(Block):
        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            tensor, *rest = super().forward(*args, **kwargs)
            return (self.end(tensor), *rest)  # type: ignore[operator, return-value]

    for block in net.blocks:
        block.__class__, block.end = Ended, nn.Identity()
    model = wrap(net, [f"{name}.end" for name in BLOCKS])
    assert list(net.state_dict()) == keys
    assert_right(model)


# ---------------------------------------------------------------- graphs of torch.fx


def small_resnet() -> ResNet:
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)


def test_blocks_that_came_apart_in_a_graph_are_told_and_can_be_kept_whole() -> None:
    stages = ["layer1", "layer2", "layer3", "layer4"]
    with pytest.raises(
        ValueError, match=r"never ran in a forward: \['layer1', .*come apart.*'leaf_modules': \[type\(block\)\]"
    ):
        wrap(create_feature_extractor(small_resnet(), ["layer4"]), stages)
    whole = create_feature_extractor(small_resnet(), ["layer4"], tracer_kwargs={"leaf_modules": [BasicBlock]})
    assert_right(wrap(whole, [f"{stage}.0" for stage in stages]))
    assert_right(wrap(small_resnet(), stages))


class Held(nn.Module):
    def __init__(self, holder: nn.Module) -> None:
        super().__init__()
        self.held, self.top = holder, conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.held._modules.values():
            assert part is not None
            x = part(x)
        return self.top(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("holder", "last"),
    [
        (lambda: nn.ModuleList([conv(3, 4), conv(4, 4)]), "held.1"),
        (lambda: nn.ModuleDict({"low": conv(3, 4), "high": conv(4, 4)}), "held.high"),
        (small_net, "held.2"),
    ],
)
def test_a_holder_that_is_not_called_itself_is_told_and_its_last_module_ends_a_stage(
    holder: Callable[[], nn.Module], last: str
) -> None:
    with pytest.raises(ValueError, match=f"never ran.*name that, such as '{last}'"):
        wrap(Held(holder()), ["held", "top"])
    assert_right(wrap(Held(holder()), [last, "top"]))


# ---------------------------------------------------------------- why a backbone does not run


class Asserts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 5:
            raise AssertionError  # as `assert` does where pytest does not rewrite it
        return x


def test_an_exception_without_a_text_tells_its_line() -> None:
    with pytest.raises(
        ValueError, match=r"AssertionError in forward, line \d+ of .*test_advice.py: raise AssertionError"
    ):
        wrap(nn.Sequential(Asserts(), conv(5, 4), conv(4, 4)), [1, 2])
    with pytest.raises(ValueError, match=r"decoder of unit 0 does not run .*: AssertionError"):
        wrap(small_net(), [0, 1], decoder=lambda width: Asserts())
    wrap(nn.Sequential(Asserts(), conv(5, 4), conv(4, 4)), [1, 2], example=torch.rand(2, 5, 8, 8))


class Particular(nn.Module):
    """Runs, but not behind a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 4), conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if type(y.grad_fn).__name__ not in ("ConvolutionBackward0", "NoneType"):
            raise TypeError("where is the convolution?")
        return self.b(y)  # type: ignore[no-any-return]


def test_a_backbone_that_runs_without_cuts_is_not_told_to_get_another_batch() -> None:
    with pytest.raises(
        ValueError, match=r"if stages end after \['a', 'b'\], though it runs without .*where is the convol"
    ) as told:
        wrap(Particular(), ["a", "b"])
    assert "example=" not in str(told.value)


# ---------------------------------------------------------------- scripted, lazy, inference mode


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", ["scripted", "traced"])
def test_scripted_parts_may_be_inside_of_stages_but_do_not_end_one(way: str) -> None:
    net = nn.Sequential(*(nn.Sequential(conv(before, 4), nn.BatchNorm2d(4), nn.ReLU()) for before in (3, 4, 4)))
    inside = net[1][:2]
    part = torch.jit.script(inside) if way == "scripted" else torch.jit.trace(inside, torch.rand(2, 4, 8, 8))
    plain = deepcopy(net)
    net[1] = nn.Sequential(part, nn.ReLU())
    with pytest.raises(ValueError, match=r"its submodule '1.0' was scripted or traced, and takes no hooks"):
        wrap(net, ["0", "1.0", "2"])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = wrap(net, [0, 1, 2])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert part.training
    same = wrap(plain, [0, 1, 2], decoder=list(deepcopy(model.decoders)))
    for _ in range(3):  # the profiling executor changes what runs; gradients add up
        pair = torch.rand(2, 4, 3, 16, 16).unbind()
        torch.testing.assert_close(model.local_step(*pair), same.local_step(*pair))
    for ours, theirs in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    with pytest.raises(ValueError, match="it was scripted or traced"):
        wrap(part, [0, 1])


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_modules_are_built_by_the_probe() -> None:
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Conv2d(4, 4, 3))
    assert_right(wrap(net, [1, 2]))
    assert net[0].in_channels == 3


def test_inference_mode_is_told_for_what_it_is() -> None:
    net = small_net()
    with torch.inference_mode():
        made_there = small_net()
        example = torch.rand(2, 3, 8, 8)
        with pytest.raises(RuntimeError, match=r"Wrap outside of it"):
            wrap(net, [0, 1, 2])
        with pytest.raises(RuntimeError, match=r"Wrap outside of it"):
            plan_stages(net, example, 2)
    with pytest.raises(ValueError, match=r"was made inside of torch.inference_mode\(\).*'0.weight'"):
        wrap(made_there, [0, 1, 2])
    assert_right(wrap(net, [0, 1, 2], example=example))


# ---------------------------------------------------------------- a wrapped backbone is as it was


class Remembers(nn.Module):
    """Keeps tensors with graphs in attributes, a list and a dict, and builds one of them anew."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.kept = conv(4, 4), [torch.zeros(1)]
        self.by_name: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.conv(x)
        self.kept.append(self.last)
        self.by_name["last"] = self.last
        return self.last


@pytest.mark.filterwarnings("ignore:.*(spectral|weight)_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "part",
    [
        lambda: torch.nn.utils.spectral_norm(conv(4, 4)),
        lambda: torch.nn.utils.parametrizations.spectral_norm(conv(4, 4)),
        Remembers,
    ],
)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_it_can_be_copied_after_wrapping(part: Any, checkpoint: bool) -> None:
    net = nn.Sequential(conv(3, 4), part(), nn.Sequential(conv(4, 4), nn.ReLU()))
    before = [{**module.__dict__} for module in net.modules()]
    wrap(net, [0, 1, 2], checkpoint=checkpoint)
    deepcopy(net)
    for module, known in zip(net.modules(), before, strict=True):
        assert module.__dict__.keys() == known.keys()
        assert all(module.__dict__[name] is value for name, value in known.items())
    if isinstance(net[1], Remembers):
        assert (len(net[1].kept), net[1].by_name) == (1, {})


class BuildsItself(nn.Module):
    """Makes its weight in the first forward: what the optimiser gets is what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = None
        self.built = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.built:
            self.weight, self.built = nn.Parameter(torch.rand(x.shape[1], 1, 1)), True
        assert self.weight is not None
        return x * self.weight


def test_what_the_first_forward_builds_stays() -> None:
    net = nn.Sequential(conv(3, 4), BuildsItself(), conv(4, 4))
    model = wrap(net, [0, 1, 2])
    weights = list(model.parameters())
    assert_right(model)
    assert all(any(weight is known for known in weights) for weight in model.parameters())
    assert net[1].weight.grad is not None
