"""What is refused, with a message that names the thing and the way out; afterwards all is clean and the next step is right."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from oracle import assert_same, gradients, oracle
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18
from zoo import Chain, conv, small_net

from locallearn import InfoNCE, LocalWrapper, MLPDecoder, Plan, Soft, UpperOnly, fused

EXAMPLE = (2, 3, 8, 8)
ABC = ["a", "b", "c"]


def wrap(backbone: nn.Module, stages: Any, **options: Any) -> LocalWrapper:
    return LocalWrapper(backbone, stages, **{"decoder": MLPDecoder, "example": torch.rand(EXAMPLE), **options})


def views(n: int = 4) -> tuple[Tensor, ...]:
    return torch.rand(2, n, 3, 8, 8).unbind()


def assert_clean(backbone: nn.Module) -> None:
    for module in backbone.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert torch.is_grad_enabled()


def compiled(backbone: nn.Module) -> nn.Module:
    return torch.compile(backbone, backend="eager")  # type: ignore[return-value]


def compiled_in_place(path: str) -> nn.Module:
    backbone = nn.Sequential(small_net(), conv(4, 4))
    backbone.get_submodule(path).compile(backend="eager")
    return backbone


BUILDING: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "unknown stages, all of them": (
        lambda: wrap(resnet18(), ["layer5", "layer1", "pool"]),
        ValueError,
        r"\['layer5', 'pool'\] that ResNet does not have; it has \['conv1', .*'fc'\]",
    ),
    "unknown module": (lambda: wrap(small_net(), [nn.ReLU()]), ValueError, r"\['ReLU'\] that Sequential does not have"),
    "index out of range": (lambda: wrap(small_net(), [0, 9]), ValueError, r"\[9\] that Sequential does not have"),
    "index without Sequential": (
        lambda: wrap(Chain(), [0, 1]),
        TypeError,
        "child indices need an nn.Sequential; Chain",
    ),
    "one name instead of a list": (lambda: wrap(Chain(), "a"), TypeError, r"stages=\['layer1', 'layer2'\]; got 'a'"),
    "no stages": (lambda: wrap(Chain(), []), TypeError, "stages is a list"),
    "a stage of another kind": (
        lambda: wrap(Chain(), ["a", 1.5]),
        TypeError,
        "a name, a module or a child index; got 1.5",
    ),
    "duplicate stage": (lambda: wrap(Chain(), ["a", "a"]), ValueError, "'a' is named twice"),
    "one module under two names": (
        lambda: wrap(nn.Sequential(same := conv(3, 3), same), [0, 1]),
        ValueError,
        "'0' and '1' are the same module",
    ),
    "not in execution order": (
        lambda: wrap(zoo.OutOfOrder(), ABC),
        ValueError,
        r"stages=\['b', 'a', 'c'\]; got \['a', 'b', 'c'\]",
    ),
    "never ran": (lambda: wrap(Unused(), ["a", "unused"]), ValueError, r"never ran in a forward: \['unused'\]"),
    "a ModuleList": (lambda: wrap(Listed(), ["list"], overlap=0), ValueError, "name that, such as 'list.1'"),
    "ran twice": (lambda: wrap(zoo.RunsTwice(), ABC), ValueError, r"more than once in a forward: \['b'\]"),
    "too few stages": (lambda: wrap(Chain(), ["a"]), ValueError, "overlap=1 needs at least 2 stages; there is 1"),
    "overlap out of range": (lambda: wrap(Chain(), ABC, overlap=3), ValueError, "overlap=3 needs at least 4 stages"),
    "skip over a cut": (
        lambda: wrap(zoo.SkipOverCut(), ABC),
        ValueError,
        r"stage 2 \('c'\) uses the outlet of stage 0",
    ),
    "skip over a cut, greedily": (
        lambda: wrap(zoo.SkipOverCut(), ABC, overlap=0),
        ValueError,
        "uses the outlet of stage 0",
    ),
    "skip from inside": (
        lambda: wrap(zoo.SkipFromInside(), ABC),
        ValueError,
        r"stage 2 \('c'\) uses an activation of 'stem', made in stage 0 \('a'\). A skip connection",
    ),
    "shared parameter": (
        lambda: wrap(zoo.SharedWeight(), ABC),
        ValueError,
        r"stage 2 \('c'\) uses parameter 'a.weight', which stage 0 \('a'\) uses too",
    ),
    "outlet without a tensor": (
        lambda: wrap(Silent(), ABC),
        TypeError,
        "'b', which returned a NoneType without a tensor",
    ),
    "compiled as a whole": (lambda: wrap(compiled(small_net()), [0, 1]), ValueError, "was compiled, and hooks"),
    "compiled in place": (lambda: wrap(compiled_in_place(""), [0, 1]), ValueError, "was compiled, and hooks"),
    "compiled around a cut": (
        lambda: wrap(compiled_in_place("0"), ["0.0", "1"]),
        ValueError,
        "submodule '0' was compiled",
    ),
    "decoder that begins in place": (
        lambda: wrap(Chain(), ABC, decoder=lambda c: nn.Sequential(nn.ReLU(inplace=True), MLPDecoder(c))),
        RuntimeError,
        r"decoder of unit 0 changes the outlet that it reads in place.*inplace=False",
    ),
    "decoder that does not fit": (
        lambda: wrap(Chain(), ABC, decoder=lambda c: MLPDecoder(c + 1)),
        ValueError,
        r"decoder of unit 0 does not run on the outlet it reads, of shape \(2, 4, 8, 8\): MLPDecoder reads \(N, 5",
    ),
    "decoder that is a module": (
        lambda: wrap(Chain(), ABC, decoder=MLPDecoder(4)),
        TypeError,
        "got the module MLPDecoder itself",
    ),
    "decoder of another kind": (lambda: wrap(Chain(), ABC, decoder="mlp"), TypeError, "got 'mlp'"),
    "decoder that makes no module": (
        lambda: wrap(Chain(), ABC, decoder=lambda c: None),
        TypeError,
        "returned a NoneType",
    ),
    "too few decoders": (lambda: wrap(Chain(), ABC, decoder=[MLPDecoder(4)]), ValueError, "1 modules for 2 units"),
    "decoders of another kind": (lambda: wrap(Chain(), ABC, decoder=[MLPDecoder, 3]), TypeError, r"\['type', 'int'\]"),
    "too few losses": (lambda: wrap(Chain(), ABC, loss=[InfoNCE()]), ValueError, "1 losses for 2 units"),
    "loss that is a class": (lambda: wrap(Chain(), ABC, loss=InfoNCE), TypeError, r"such as InfoNCE\(\)"),
    "loss of another kind": (lambda: wrap(Chain(), ABC, loss="infonce"), TypeError, "got 'infonce'"),
    "plan of another size": (lambda: wrap(Chain(), ABC, plan=Plan.windows(4, 1)), ValueError, "for 4 stages, but .* 3"),
    "plan and sharing": (
        lambda: wrap(Chain(), ABC, plan=Plan.windows(3, 1), sharing=UpperOnly()),
        ValueError,
        "plan= replaces overlap and sharing",
    ),
    "schedule that loses a unit": (
        lambda: wrap(Chain(), ABC, schedule=lambda plan: list(fused(plan))[:-1]),
        ValueError,
        r"trains the units \[0\], not each of the 2 once. It is: F0 F1 F2 T0",
    ),
    "soft sharing of a stage of several modules": (
        lambda: wrap(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4)), [0, 2], sharing=Soft()),
        ValueError,
        "soft sharing copies stage 1, which must be one module",
    ),
    "soft sharing with another overlap": (
        lambda: wrap(Chain(), ABC, overlap=2, sharing=Soft()),
        ValueError,
        "overlap=1; got",
    ),
    "no module": (lambda: wrap("resnet50", ["layer1"]), TypeError, "wraps an nn.Module; got 'resnet50'"),  # type: ignore[arg-type]
}


class Unused(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.unused = conv(4, 4)


class Silent(Chain):
    """The middle stage keeps what it computes to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.b = Forgets()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.stem(x))
        self.b(x)
        return self.c(x)


class Forgets(nn.Module):
    def forward(self, x: Tensor) -> None:
        return None


class Listed(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ModuleList([conv(3, 4), conv(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.list:
            x = layer(x)
        return x


@pytest.mark.parametrize("case", BUILDING)
def test_refused_when_wrapping(case: str) -> None:
    build, kind, message = BUILDING[case]
    with pytest.raises(kind, match=message):
        build()


@pytest.mark.parametrize(
    "backbone", [zoo.SkipOverCut, zoo.SkipFromInside, zoo.SharedWeight, zoo.RunsTwice, Silent, zoo.OutOfOrder]
)
def test_a_refused_backbone_stays_clean(backbone: type[nn.Module]) -> None:
    spoilt = backbone()
    modes = [module.training for module in spoilt.modules()]
    with pytest.raises((ValueError, TypeError)):
        wrap(spoilt, ABC)
    assert_clean(spoilt)
    assert [module.training for module in spoilt.modules()] == modes
    assert not gradients(spoilt)


STEPPING: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "views of different shapes": (
        (torch.rand(4, 3, 8, 8), torch.rand(2, 3, 8, 8)),
        ValueError,
        r"same shape, dtype and device; got \(4, 3, 8, 8\).*\(2, 3, 8, 8\)",
    ),
    "no views": ((), ValueError, "at least one view"),
    "views of another kind": (([torch.rand(4, 3, 8, 8)],), TypeError, r"a view is a tensor, a tuple .* got \['list'\]"),
    "views without a tensor": (({"x": 1},), TypeError, "without any tensor in it"),
    "a batch of one": (torch.rand(2, 1, 3, 8, 8, dtype=torch.float64).unbind(), ValueError, "at least two pairs"),
}


@pytest.mark.parametrize("case", STEPPING)
@pytest.mark.parametrize("entry", ["local_step", "forward"])
def test_refused_when_stepping(case: str, entry: str) -> None:
    given, kind, message = STEPPING[case]
    model = wrap(small_net(), [0, 1, 2])
    with pytest.raises(kind, match=message):
        getattr(model, entry)(*given)
    assert_clean(model)
    assert_next_step_is_right(model)


@pytest.mark.parametrize(
    ("loss", "kind", "message"),
    [
        (
            lambda a, b: (a - b).square(),
            ValueError,
            r"loss of unit 0 returns a scalar; got shape \(4, 128\).*reduction='mean'",
        ),
        (lambda a, b: 1.0, TypeError, "loss of unit 0 returns a scalar tensor; got float"),
        (lambda a, b: (a - b).detach().sum(), ValueError, "loss of unit 0 has lost the graph"),
    ],
)
def test_losses_that_cannot_be_trained_are_refused(loss: Any, kind: type[Exception], message: str) -> None:
    model = wrap(small_net(), [0, 1, 2], loss=loss)
    with pytest.raises(kind, match=message):
        model.local_step(*views())
    assert_clean(model)


class FirstOnly(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return maps[:1]


def test_a_decoder_that_loses_the_batch_is_refused() -> None:
    model = wrap(small_net(), [0, 1, 2], decoder=lambda width: FirstOnly())
    with pytest.raises(
        ValueError, match=r"decoder of unit 0 returns one tensor, the 2 views along .* got shape \(1, 4"
    ):
        model.local_step(*views())


def test_a_decoder_on_the_backbones_weights_is_refused() -> None:
    backbone = small_net()
    tied = nn.Sequential(nn.Conv2d(4, 4, 3), MLPDecoder(4))
    tied[0].weight = backbone[0].weight = nn.Parameter(torch.rand(4, 4, 3, 3))
    backbone[0].weight.data = torch.rand(4, 4, 3, 3)
    model = wrap(
        backbone, [0, 1, 2], overlap=0, decoder=[tied, MLPDecoder(4), MLPDecoder(4)], example=torch.rand(2, 4, 8, 8)
    )
    with pytest.raises(
        ValueError, match=r"a decoder or a loss uses parameter '0.weight', which stage 0 \('0'\) uses too"
    ):
        model.local_step(*torch.rand(2, 4, 4, 8, 8).unbind())
    assert_clean(model)


# ---------------------------------------------------------------- found only while training


class Fails(nn.Module):
    """Raises once, when told to."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.now = False

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.now:
            raise ArithmeticError("as told")
        result: Tensor = self.inner(*inputs)
        return result


def assert_next_step_is_right(model: LocalWrapper) -> None:
    pair = views()
    model.zero_grad()
    losses, expected = oracle(model, *pair)
    torch.testing.assert_close(model.local_step(*pair), losses)
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("where", ["backbone", "decoder", "loss"])
@pytest.mark.parametrize("entry", ["local_step", "forward"])
def test_after_an_exception_half_way_the_next_step_is_right(where: str, entry: str) -> None:
    backbone = small_net()
    decoders: list[nn.Module] = [MLPDecoder(4), MLPDecoder(4)]
    losses: list[nn.Module] = [InfoNCE(), InfoNCE()]
    broken = Fails({"backbone": backbone[2], "decoder": decoders[1], "loss": losses[1]}[where])
    if where == "backbone":
        backbone[2] = broken
    elif where == "decoder":
        decoders[1] = broken
    else:
        losses[1] = broken
    model = wrap(backbone, [0, 1, 2], decoder=decoders, loss=losses)
    broken.now = True
    with pytest.raises(ArithmeticError, match="as told"):
        getattr(model, entry)(*views())
    assert_clean(model)
    if entry == "forward":
        assert not gradients(model)
    broken.now = False
    assert_next_step_is_right(model)


class ChangesItsMind(Chain):
    """In training, spoils the chain in the way it is told to."""

    spoil = ""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.stem(x))
        if self.training and self.spoil == "skip":
            return self.c(self.b(x) + x)
        if self.training and self.spoil == "never":
            return self.c(x)
        if self.training and self.spoil == "twice":
            x = self.b(x)
        return self.c(self.b(x))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [("skip", "uses the outlet of stage 0"), ("never", r"never ran.*\['b'\]"), ("twice", "more than once.*'b'")],
)
def test_what_shows_only_in_training_is_refused_there(spoil: str, message: str) -> None:
    backbone = ChangesItsMind()
    model = wrap(backbone, ABC)
    backbone.spoil = spoil
    with pytest.raises(ValueError, match=message):
        model.local_step(*views())
    assert_clean(model)
    backbone.spoil = ""
    assert_next_step_is_right(model)


def test_a_weight_that_comes_to_be_shared_is_refused() -> None:
    backbone = Chain()
    model = wrap(backbone, ABC)
    backbone.c.weight = backbone.b.weight
    with pytest.raises(ValueError, match=r"parameter 'b\.weight', which stage 1"):
        model.local_step(*views())


def test_a_backbone_compiled_after_wrapping_is_refused() -> None:
    model = wrap(small_net(), [0, 1, 2])
    model.backbone.compile(backend="eager")
    with pytest.raises(ValueError, match="was compiled"):
        model.local_step(*views())


# ---------------------------------------------------------------- operations in place


def in_place() -> nn.Sequential:
    return nn.Sequential(
        conv(3, 4, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), conv(4, 4), nn.ReLU(inplace=True), conv(4, 4)
    )


@pytest.mark.parametrize("overlap", [0, 1, 2])
@pytest.mark.parametrize("entry", ["step", "call"])
def test_stages_may_begin_in_place(overlap: int, entry: str) -> None:
    model = wrap(in_place(), [1, 3, 5], overlap=overlap)
    pair = views()
    losses, expected = oracle(model, *pair)
    if entry == "step":
        model.local_step(*pair)
    else:
        model(*pair).backward()
    torch.testing.assert_close(model.losses, losses)
    assert_same(gradients(model), expected)


def test_an_outlet_overwritten_before_its_unit_reads_it_is_refused() -> None:
    model = wrap(in_place(), [1, 3, 5], schedule=fused)
    with pytest.raises(RuntimeError, match=r"outlet of stage 1 \('3'\) was changed in place before unit 0 read it"):
        model.local_step(*views())
    assert_clean(model)


def test_a_decoder_that_begins_in_place_in_training_only_is_refused_there() -> None:
    model = wrap(small_net(), [0, 1, 2], decoder=lambda c: nn.Sequential(nn.Dropout(0.5, inplace=True), MLPDecoder(c)))
    with pytest.raises(
        RuntimeError, match="the decoder or the loss of unit 0 changes the outlet that it reads in place"
    ):
        model.local_step(*views())
    assert_clean(model)


# ---------------------------------------------------------------- checkpointing


class Checkpointed(Chain):
    """Stages whose inside is checkpointed, or which are checkpointed with their end."""

    def __init__(self, *, reentrant: bool, inside: bool) -> None:
        super().__init__()
        self.reentrant, self.inside = reentrant, inside
        self.end_a, self.end_b = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for layers, end in (((self.stem, self.a), self.end_a), ((self.b,), self.end_b), ((self.c,), nn.Identity())):
            whole = nn.Sequential(*layers, nn.Tanh(), nn.Dropout(0.3), *([] if self.inside else [end]))
            x = checkpoint(whole, x, use_reentrant=self.reentrant)
            x = end(x) if self.inside else x
        return x


def test_stages_may_be_checkpointed_inside() -> None:
    model = wrap(Checkpointed(reentrant=False, inside=True), ["end_a", "end_b"])
    pair = views()
    state = torch.get_rng_state()
    losses, expected = oracle(model, *pair)
    torch.set_rng_state(state)
    torch.testing.assert_close(model.local_step(*pair), losses)
    assert_same(gradients(model), expected)


def test_a_cut_inside_of_a_checkpointed_function_is_refused() -> None:
    model = wrap(Checkpointed(reentrant=False, inside=False), ["end_a", "end_b"])
    with pytest.raises(RuntimeError, match=r"so that none of the cuts lies inside of one: \['end_a', 'end_b'\]"):
        model.local_step(*views())
    assert_clean(model)


def test_reentrant_checkpointing_is_refused() -> None:
    backbone = nn.Sequential(conv(3, 3), Checkpointed(reentrant=True, inside=True))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        wrap(backbone, ["0", "1.end_a", "1.end_b"])


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"overlap": "1"}, TypeError, "overlap is a whole number; got '1'"),
        ({"overlap": 1.5}, TypeError, "overlap is a whole number; got 1.5"),
        ({"schedule": "fused"}, TypeError, "such as locallearn.sequential or locallearn.fused; got 'fused'"),
        ({"schedule": lambda plan: None}, TypeError, "Forward and Train actions in their order; got None"),
        ({"example": 3}, TypeError, "a list of views; got 3"),
        ({"example": torch.rand(0, 3, 8, 8)}, ValueError, "a batch without anything in it"),
        ({"stages": "auto", "example": torch.rand(0, 3, 8, 8)}, ValueError, "a batch without anything in it"),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, dict) else " ".join(value),
)
def test_arguments_of_another_kind(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    net = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)))
    with pytest.raises(kind, match=re.escape(message)):
        LocalWrapper(net, **{"stages": [0, 1, 2], "example": torch.rand(2, 3, 8, 8), **options})


@pytest.mark.parametrize(
    ("scale", "kind", "message"),
    [
        ("a", TypeError, "a number, such as scaler.get_scale(); got 'a'"),
        (0.0, ValueError, "more than 0, and finite; got 0.0"),
        (-1, ValueError, "got -1"),
        (float("inf"), ValueError, "got inf"),
        (torch.ones(2), ValueError, "a tensor of shape (2,)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("entry", ["local_step", "forward"])
def test_scales_that_are_none(scale: Any, kind: type[Exception], message: str, entry: str) -> None:
    net = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)))
    views = torch.rand(2, 2, 3, 8, 8).unbind()
    model = LocalWrapper(net, [0, 1, 2], example=views[0])
    with pytest.raises(kind, match=re.escape(message)):
        getattr(model, entry)(*views, grad_scale=scale)
    assert all(weight.grad is None for weight in model.parameters())
