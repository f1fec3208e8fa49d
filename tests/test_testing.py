"""``locallearn.testing`` passes what is right, names what is wrong, and leaves the user's model as it was."""

from __future__ import annotations

import copy
import inspect
import random
import sys
import textwrap
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint
from zoo import ZOO, Chain, SkipOverCut, conv, small_net

from locallearn import Hard, InfoNCE, LocalWrapper, MLPDecoder, Plan, Soft, Unit, UpperOnly
from locallearn.testing import LocalGradients, assert_local_gradients, local_gradients
from locallearn.wrapper import LocalPass

SIX = partial(MLPDecoder, out_features=6)


def pair(dtype: torch.dtype | None = None, n: int = 4) -> tuple[Tensor, ...]:
    return torch.randn(2, n, 3, 8, 8, dtype=dtype).unbind()


def net() -> nn.Sequential:
    """Three stages, each one module: BatchNorm, dropout, spectral normalisation and all."""
    return nn.Sequential(
        nn.Sequential(conv(3, 4, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        nn.Sequential(spectral_norm(conv(4, 4)), nn.Dropout(0.3), nn.Tanh()),
        nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.Tanh()),
        nn.Linear(8, 3),
    )


def wrap(backbone: nn.Module | None = None, stages: Any = (0, 1, 2), **options: Any) -> LocalWrapper:
    options = {"decoder": SIX, "example": torch.rand(2, 3, 8, 8), **options}
    return LocalWrapper(net() if backbone is None else backbone, stages, **options)


# ---------------------------------------------------------------- it passes what is right


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backbone", ZOO)
def test_the_zoo_passes_in_either_precision(backbone: str, dtype: torch.dtype) -> None:
    specimen = ZOO[backbone]
    torch.set_default_dtype(dtype)
    views = tuple(view.to(dtype) for view in specimen.views(3))
    model = LocalWrapper(specimen.build(), specimen.stages, decoder=specimen.decoder, example=views[0])
    assert_local_gradients(model, *views)
    assert local_gradients(model, *views).dtype == torch.float64


@pytest.mark.parametrize("sharing", [Hard(), UpperOnly(), Soft(0.3)], ids=["hard", "upper only", "soft"])
@pytest.mark.parametrize("policy", [False, True, nn.Sequential], ids=["kept", "recomputed", "stages recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_sharing_passes_with_and_without_recomputation(sharing: Any, policy: Any, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    model = wrap(sharing=sharing, checkpoint=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):  # in the second one the penalty is not zero
        assert_local_gradients(model, *pair())
        model.local_step(*pair())
        optimizer.step()
    if isinstance(sharing, Soft):
        assert local_gradients(model, *pair()).penalty > 0  # type: ignore[operator]


def test_soft_sharing_pulls_both_sides_towards_each_other() -> None:
    model = wrap(small_net(), sharing=Soft(0.3))
    model.decoders[0][0].stage.bias.data += 2  # type: ignore[index, union-attr, operator]
    alone, views = copy.deepcopy(model), pair()
    alone.sharing = Hard()
    pulled, greedy = local_gradients(model, *views).gradients, local_gradients(alone, *views).gradients
    apart = torch.full((4,), 2 * 0.3 * 2.0)
    torch.testing.assert_close(pulled["decoders.0.0.stage.bias"] - greedy["decoders.0.0.stage.bias"], apart)
    torch.testing.assert_close(pulled["backbone.1.bias"] - greedy["backbone.1.bias"], -apart)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # stage 0 has images for its input
def test_hooks_frozen_weights_and_modes_pass() -> None:
    backbone = net()
    for at in range(3):
        backbone[at].register_full_backward_hook(lambda module, back, _: tuple(g if g is None else 2 * g for g in back))
        backbone[at].register_forward_hook(lambda module, args, output: output * 1.5)
    backbone[1][0].register_full_backward_pre_hook(lambda module, front: (0.5 * front[0],))
    backbone[0].requires_grad_(False)
    backbone[2][1].eval()
    model = wrap(backbone)
    assert_local_gradients(model, *pair())
    expected = local_gradients(model, *pair())
    assert not any(name.startswith("backbone.0.") for name in expected.gradients)
    assert expected.buffers["backbone.2.1.num_batches_tracked"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_of_any_kind_pass(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    model = wrap(loss=nn.CrossEntropyLoss())
    images = pair()[0]
    assert_local_gradients(model, images, targets=torch.tensor([0, 1, 2, 3]))
    assert_local_gradients(model, images, targets=torch.rand(4, 6).softmax(1))  # of the dtype that the loss needs
    twofold = wrap(loss=lambda z, targets: nn.functional.cross_entropy(z, targets["soft"][0]))
    assert_local_gradients(twofold, images, targets={"soft": [torch.rand(4, 6).softmax(1)]})


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, *views: Tensor) -> Tensor:
        return InfoNCE()(*(self.scale * view for view in views))


def test_what_units_share_outside_of_the_backbone_is_trained_by_all_of_them() -> None:
    decoder = nn.Sequential(nn.Dropout(0.3), SIX(4))  # draws random numbers in between those of the stages
    model = wrap(decoder=[decoder, decoder], loss=Scaled())
    assert_local_gradients(model, *pair())
    expected = local_gradients(model, *pair())
    assert expected.trained_by["loss.scale"] == (0, 1)
    assert expected.trained_by["backbone.0.0.weight"] == (0,)
    assert expected.trained_by["backbone.1.0.bias"] == (0, 1)
    assert expected.stages["backbone.2.0.bias"] == 2
    assert "backbone.3.weight" not in expected.gradients


class Single(nn.Module):
    """Computes in single precision, with weights or without."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.float()).tanh().to(x.dtype)  # type: ignore[no-any-return]


def test_what_computes_in_single_precision_inside_is_compared_as_exactly_as_that_allows() -> None:
    weightless = wrap(nn.Sequential(*small_net(), Single(nn.Identity())), [0, 1, 3])
    assert local_gradients(weightless, *pair())[-1] == torch.float32
    assert_local_gradients(weightless, *pair())
    fails_in_double = wrap(nn.Sequential(conv(3, 4), Single(conv(4, 4).float()), conv(4, 4)))
    assert_local_gradients(fails_in_double, *pair())
    with pytest.raises(
        AssertionError, match=r"computed in torch.float32, since in double precision it fails: Input type"
    ):
        assert_local_gradients(fails_in_double, *pair(), rtol=1e-12)


def test_half_precision_and_complex_models_are_compared_in_double_precision() -> None:
    half = wrap(small_net().bfloat16(), example=torch.rand(2, 3, 8, 8, dtype=torch.bfloat16))
    assert_local_gradients(half, *pair(torch.bfloat16))
    assert local_gradients(half, *pair(torch.bfloat16)).dtype == torch.float64
    waves = nn.Sequential(*[nn.Conv2d(3 if at == 0 else 4, 4, 1, dtype=torch.complex64) for at in range(3)])
    magnitudes = [nn.Sequential(Magnitude(), SIX(4).float()) for _ in range(2)]
    model = wrap(waves, decoder=magnitudes, example=torch.rand(2, 3, 8, 8, dtype=torch.complex64))
    assert_local_gradients(model, *pair(torch.complex64))
    assert local_gradients(model, *pair(torch.complex64)).gradients["backbone.0.weight"].dtype == torch.complex128


class Magnitude(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


def test_inside_of_autocast_its_precision_is_kept() -> None:
    model = wrap(net().float(), example=torch.rand(2, 3, 8, 8).float())
    model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert local_gradients(model, *pair(torch.float32)).dtype == torch.bfloat16
        assert_local_gradients(model, *pair(torch.float32))


def test_gradients_are_taken_wherever_it_is_called() -> None:
    model, views = wrap(), pair()
    with torch.no_grad():
        assert_local_gradients(model, *views)
    with torch.inference_mode():
        assert_local_gradients(model, *pair())


class OwnCheckpoint(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[no-any-return]


def test_statistics_that_a_users_own_checkpoint_updates_again_are_not_compared() -> None:
    model = wrap(nn.Sequential(conv(3, 4), OwnCheckpoint(nn.BatchNorm2d(4)), nn.BatchNorm2d(4)))
    assert_local_gradients(model, *pair())
    compared = local_gradients(model, *pair()).buffers
    assert not any(name.startswith("backbone.1") for name in compared)
    assert {"backbone.2.running_mean", "backbone.2.num_batches_tracked"} <= compared.keys()


class DropsLayers(Chain):
    """Layers that are skipped at random: by Python's numbers, and by numpy's."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.stem(x))
        x = x + random.random() * x.tanh()
        return self.c(self.b(x)) * np.random.rand()  # noqa: NPY002 - the global ones


def test_random_numbers_of_python_and_numpy_are_replayed_too() -> None:
    assert_local_gradients(wrap(DropsLayers(), ["a", "b", "c"]), *pair())


# ---------------------------------------------------------------- it leaves everything as it was


def everything(model: LocalWrapper) -> list[Any]:
    modules = list(model.modules())
    hooks = [[dict(held) for key, held in m.__dict__.items() if key.endswith("hooks")] for m in modules]
    tensors = [(n, t.clone(), t.data_ptr(), t._version) for n, t in model.state_dict(keep_vars=True).items()]
    grads = [(p.grad, None if p.grad is None else p.grad.clone(), p.requires_grad) for p in model.parameters()]
    names = [sorted(m.__dict__) for m in modules]
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    return [modules, hooks, tensors, grads, names, states, [m.training for m in modules], model.losses, model.penalty]


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    elif isinstance(one, Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_model_and_the_views_are_as_they_were_also_after_a_failure(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_default_dtype(dtype)
    model, images = wrap(sharing=Soft(0.3)), torch.randn(8, 3, 8, 8)
    model.decoders[0][0].stage[0].bias.data += 2  # type: ignore[index, union-attr, operator]
    model.local_step(*images.chunk(2))  # so that there are gradients, losses and statistics
    model.backbone[0].register_forward_hook(lambda module, args, output: output * 2)  # type: ignore[index]
    model.backbone[1][0].bias.register_hook(lambda gradient: gradient * 3)  # type: ignore[index]
    before = [*everything(model), images.clone()]
    local_gradients(model, *images.chunk(2))
    assert_local_gradients(model, *images.chunk(2))
    assert_equal([*everything(model), images], before)
    monkeypatch.setattr(LocalWrapper, "_train_penalty", lambda *_: None)
    with pytest.raises(AssertionError):
        assert_local_gradients(model, *images.chunk(2))
    assert_equal([*everything(model), images], before)
    model.backbone[1].forward = lambda x: 1 / 0  # type: ignore[index, method-assign]
    before = [*everything(model), images.clone()]
    with pytest.raises(ZeroDivisionError):
        assert_local_gradients(model, *images.chunk(2))
    assert_equal([*everything(model), images], before)


def test_twice_the_same_is_the_same() -> None:
    model, views = wrap(), pair()
    one, other = local_gradients(model, *views), local_gradients(model, *views)
    assert isinstance(one, LocalGradients)
    torch.testing.assert_close(one.gradients, other.gradients, rtol=0, atol=0)
    torch.testing.assert_close(one.buffers, other.buffers, rtol=0, atol=0)
    assert torch.equal(one.losses, other.losses)
    model.local_step(*views)  # draws what the reference drew
    assert torch.equal(one.losses, model.losses)  # type: ignore[arg-type]


# ---------------------------------------------------------------- it names what is wrong


def mutated(monkeypatch: pytest.MonkeyPatch, old: str, new: str, method: str = "_walk") -> None:
    """Breaks one line of the walk."""
    source = textwrap.dedent(inspect.getsource(getattr(LocalPass, method)))
    assert source.count(old) == 1
    namespace: dict[str, Any] = {}
    exec(source.replace(old, new), vars(sys.modules[LocalPass.__module__]), namespace)
    monkeypatch.setattr(LocalPass, method, namespace[method])


SHARED = (
    r"backbone.1.weight has norm \S+, expected \S+: relative error \S+ \(of stage 1 \('1'\), trained by units 0, 1\)"
)


def plain(**options: Any) -> LocalWrapper:
    return wrap(small_net(), **options)


class Shift(nn.Module):
    """Keeps nothing for its backward, so that a second one through it goes unnoticed."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.rand(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def test_a_forgotten_detach_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = sys.modules[LocalPass.__module__]
    monkeypatch.setattr(engine, "cut", lambda outlet, **_: ([], outlet))
    model = wrap(nn.Sequential(Shift(), Shift(), Shift()), overlap=0)
    with pytest.raises(ValueError, match=r"a decoder or a loss uses parameter '0\.by'"):
        assert_local_gradients(model, *pair())
    monkeypatch.setattr(engine.Isolation, "_claim", lambda *_: None)
    with pytest.raises(AssertionError, match=r"backbone\.0\.by has norm \S+, expected .* trained by unit 0\)\n"):
        assert_local_gradients(model, *pair())


def test_a_gradient_that_should_not_be_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LocalWrapper._train_penalty

    def reaches_below(self: LocalWrapper, ends: Any, accumulator: Any, scale: Any) -> None:
        original(self, ends, accumulator, scale)
        accumulator.push([ends[0].weight.square().sum()], [ends[0].weight], ())

    model = plain(plan=Plan(3, [Unit(1, 2)]))
    monkeypatch.setattr(LocalWrapper, "_train_penalty", reaches_below)
    with pytest.raises(
        AssertionError,
        match=r"local_step: backbone.0.weight has a norm of \S+; expected none \(of stage 0 \('0'\), trained by no unit\)\n"
        r".*loss.backward\(\): backbone.0.weight",
    ):
        assert_local_gradients(model, *pair())


def test_a_long_list_of_problems_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    mutated(monkeypatch, "self._push(segment, flow, below=below)", "self._push(segment, [3 * flow[0]], below=below)")
    specimen = ZOO["resnet18"]
    model = LocalWrapper(specimen.build(), specimen.stages, 0, specimen.decoder, example=specimen.views(2)[0])
    with pytest.raises(AssertionError, match=r"\n  local_step: and \d+ more\n  loss.backward\(\): ") as caught:
        assert_local_gradients(model, *specimen.views())
    assert len(str(caught.value).splitlines()) == 1 + 2 * 21


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("added(pending, flow)", "[*flow]"),
        ("added(pending, flow)", "added(added(pending, flow), flow) if pending else [*flow]"),
    ],
    ids=["skipped", "doubled"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pending_sum_that_is_skipped_or_doubled_is_caught(
    old: str, new: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_default_dtype(dtype)
    model = plain(overlap=1)
    assert_local_gradients(model, *pair())
    mutated(monkeypatch, old, new)
    with pytest.raises(AssertionError, match=SHARED) as caught:
        assert_local_gradients(model, *pair())
    assert "rtol=1e-08, computed in torch.float64" in str(caught.value)
    assert "backbone.2.weight" not in str(caught.value)  # which is right


def test_a_stage_that_is_updated_outside_of_updates_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    mutated(monkeypatch, "if flow and stage in unit.updates:", "if flow:")
    with pytest.raises(AssertionError, match=r"backbone.1.weight has norm .*of stage 1 \('1'\), trained by unit 1\)"):
        assert_local_gradients(plain(sharing=UpperOnly()), *pair())


def test_a_stage_that_is_not_updated_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    mutated(monkeypatch, "self._push(segment, pending, below=False)", "pass")
    with pytest.raises(
        AssertionError, match=r"backbone.1.weight is missing; expected a norm of \S+ \(of stage 1 .* units 0, 1\)"
    ):
        assert_local_gradients(plain(overlap=1), *pair())


def test_a_graph_that_is_freed_too_early_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    mutated(monkeypatch, "retain=bool(pending) or not last", "retain=False")
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        assert_local_gradients(wrap(overlap=1), *pair())


def test_a_buffer_that_is_updated_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., list[Tensor]] = LocalPass.run

    def run(self: LocalPass, batch: Tensor) -> list[Tensor]:
        with torch.no_grad():
            self._backbone(batch)
        return original(self, batch)

    model = wrap(nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), conv(4, 4)))
    monkeypatch.setattr(LocalPass, "run", run)
    with pytest.raises(AssertionError) as caught:
        assert_local_gradients(model, *pair())
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 6
    assert all(" buffer backbone.1." in line for line in lines)


def test_a_forgotten_penalty_and_other_losses_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain(sharing=Soft(0.3))
    model.decoders[0][0].stage.bias.data += 2  # type: ignore[index, union-attr, operator]
    monkeypatch.setattr(LocalWrapper, "_train_penalty", lambda *_: None)
    with pytest.raises(AssertionError, match=r"penalty is missing(.|\n)*backbone.1.bias"):
        assert_local_gradients(model, *pair())
    monkeypatch.undo()
    mutated(monkeypatch, "loss.detach()", "2 * loss.detach()", "_train")
    with pytest.raises(AssertionError, match=r"loss 1 has norm \S+, expected \S+: relative error 1\n"):
        assert_local_gradients(model, *pair())


def test_numbers_that_are_none_are_never_right() -> None:
    model = plain()
    model.backbone[1].weight.data[0] = torch.nan  # type: ignore[index, union-attr]
    with pytest.raises(AssertionError, match="has norm nan, expected nan"):
        assert_local_gradients(model, *pair())


# ---------------------------------------------------------------- it says what it needs


class Around(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("check", [local_gradients, assert_local_gradients])
def test_arguments_of_the_wrong_kind_are_told(check: Callable[..., object]) -> None:
    model, (view, _) = plain(), pair()
    with pytest.raises(TypeError, match=r"a LocalWrapper is compared with plain autograd; got Sequential\.$"):
        check(model.backbone, view)
    with pytest.raises(TypeError, match=r"got Around\. Take what it wraps, `.module`"):
        check(Around(model), view)
    with pytest.raises(ValueError, match="at least one view; got none"):
        check(model)
    with pytest.raises(TypeError, match=r"a view is a tensor, a tuple .* got \['list'\]"):
        check(model, [view, view])


def test_a_tolerance_is_positive() -> None:
    with pytest.raises(ValueError, match="more than 0; got 0"):
        assert_local_gradients(plain(), *pair(), rtol=0.0)


def test_a_model_that_cannot_be_copied_is_told_what_to_do() -> None:
    model = plain()
    model.lock = threading.Lock()
    with pytest.raises(RuntimeError, match=r"cannot be copied: cannot pickle .*lock.* needs a __deepcopy__"):
        local_gradients(model, *pair())
    del model.lock
    model.kept = model.backbone[0].weight * 2  # type: ignore[index, union-attr, operator]
    with pytest.raises(RuntimeError, match="detach it or check the model before its first step"):
        local_gradients(model, *pair())


def test_weights_that_nobody_registers_are_refused_and_get_no_gradient() -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    model = plain(loss=lambda one, other: InfoNCE()(one * scale, other))
    with pytest.raises(
        ValueError, match=r"unit 0 reaches 1 trainable tensor.* no parameters of the model, of shapes \[\(\)\]"
    ):
        assert_local_gradients(model, *pair())
    assert scale.grad is None


def test_a_model_in_which_nothing_is_trained_is_nothing_to_compare() -> None:
    model = plain()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no unit trains any weight"):
        assert_local_gradients(model, *pair())


def test_a_network_that_a_local_pass_refuses_is_refused_with_its_message() -> None:
    with pytest.raises(ValueError, match="A skip connection crosses a cut"):
        assert_local_gradients(wrap(SkipOverCut(), ["a", "b", "c"]), *pair())


class Stops(Chain):
    """Leaves a stage out when told to."""

    stops = False

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.stem(x))) if self.stops else super().forward(x)


def test_a_stage_that_does_not_end_once_is_told() -> None:
    model = wrap(Stops(), ["a", "b", "c"])
    model.backbone.stops = True
    with pytest.raises(ValueError, match=r"they ended in the order \['a', 'b'\]"):
        local_gradients(model, *pair())
