"""Ordinary training features: autocast, scaling, clipping, freezing, layer dropping, hooks, memory formats, optimisers."""

from __future__ import annotations

import warnings

import pytest
import torch
from oracle import assert_same, gradients, oracle
from torch import Tensor, nn
from zoo import ZOO, SkipsAtRandom, small_net

from locallearn import InfoNCE, LocalWrapper, MLPDecoder, Plan, UpperOnly

EXAMPLE = (2, 3, 8, 8)


def views(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Two views of four images that are easy to tell apart."""
    return (torch.randn(4, 3, 1, 1) * 2 + torch.rand(2, 4, 3, 8, 8)).to(dtype).unbind()


def wrap(backbone: nn.Module | None = None, **options: object) -> LocalWrapper:
    options = {"stages": [0, 1, 2], "decoder": MLPDecoder, "example": torch.rand(EXAMPLE), **options}
    return LocalWrapper(small_net() if backbone is None else backbone, **options)  # type: ignore[arg-type]


def run(model: LocalWrapper, pair: tuple[Tensor, ...], entry: str, **options: object) -> None:
    if entry == "step":
        model.local_step(*pair, **options)  # type: ignore[arg-type]
    else:
        model(*pair, **options).backward()


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("entry", ["step", "call"])
def test_bf16_autocast_is_close_to_float32(entry: str) -> None:
    model = wrap(small_net().float(), example=torch.rand(EXAMPLE, dtype=torch.float32))
    pair = views(torch.float32)
    run(model, pair, entry)
    exact = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(model, pair, entry)
    floor = 1e-2 * max(gradient.norm() for gradient in exact.values())
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        assert (gradient - exact[name]).norm() < 0.1 * max(exact[name].norm(), floor), name


def test_a_weight_cast_under_no_grad_still_gets_its_gradient() -> None:
    model = wrap(small_net().float(), example=torch.rand(EXAMPLE, dtype=torch.float32))
    pair = views(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            model(*pair)
        model.local_step(*pair)
    assert gradients(model).keys() == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("entry", ["step", "call"])
def test_grad_scale_multiplies_the_local_losses(entry: str) -> None:
    model = wrap()
    pair = views()
    losses, expected = oracle(model, *pair)
    run(model, pair, entry, grad_scale=1024.0)
    torch.testing.assert_close(model.losses, losses)
    # in a call, backward divides by the scale again and multiplies by the incoming gradient, here one
    factor = 1024 if entry == "step" else 1
    assert_same(gradients(model), {name: gradient * factor for name, gradient in expected.items()})


@pytest.mark.parametrize("entry", ["step", "call"])
def test_fp16_with_a_grad_scaler(entry: str) -> None:
    model = wrap(small_net().float(), example=torch.rand(EXAMPLE, dtype=torch.float32))
    pair = views(torch.float32)
    exact = oracle(model, *pair)[1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.autocast("cpu", dtype=torch.float16):
        if entry == "step":
            model.local_step(*pair, grad_scale=scaler.get_scale())
            scaler.scale(torch.zeros(()))  # GradScaler wants to have scaled something
        else:
            loss = model(*pair, grad_scale=scaler.get_scale())
    if entry == "call":
        scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    floor = 1e-3 * max(gradient.norm() for gradient in exact.values())
    for name, p in model.named_parameters():
        step = (before[name] - p.detach()) / 0.1
        assert (step - exact[name]).norm() < 0.05 * max(exact[name].norm(), floor), name


@pytest.mark.parametrize("entry", ["step", "call"])
def test_an_overflow_reaches_the_scaler(entry: str) -> None:
    model = wrap(small_net().float(), example=torch.rand(EXAMPLE, dtype=torch.float32))
    pair = views(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.autocast("cpu", dtype=torch.float16):
        scaler.scale(torch.zeros(()))
        if entry == "step":
            model.local_step(*pair, grad_scale=scaler.get_scale())
        else:
            loss = model(*pair, grad_scale=scaler.get_scale())
    if entry == "call":
        scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_fp16_autocast_without_grad_scale_warns() -> None:
    model = wrap(small_net().float(), example=torch.rand(EXAMPLE, dtype=torch.float32))
    pair = views(torch.float32)
    with torch.autocast("cpu", dtype=torch.float16):
        with pytest.warns(UserWarning, match=r"grad_scale=scaler.get_scale\(\)"):
            model.local_step(*pair)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.local_step(*pair, grad_scale=1.0)
            with torch.no_grad():
                model(*pair)


def test_the_incoming_gradient_scales_a_calls_gradients() -> None:
    model = wrap()
    pair = views()
    expected = oracle(model, *pair)[1]
    (model(*pair) / 4 + 1).backward()
    assert_same(gradients(model), {name: gradient / 4 for name, gradient in expected.items()})


def test_autograd_grad_on_a_calls_loss() -> None:
    model = wrap()
    pair = views()
    expected = oracle(model, *pair)[1]
    names, weights = zip(*model.named_parameters(), strict=True)
    assert_same(dict(zip(names, torch.autograd.grad(model(*pair), weights), strict=True)), expected)


def test_a_second_backward_through_one_call_is_refused() -> None:
    model = wrap()
    loss = model(*views())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"a second time.*Call model\(\*views\) again"):
        loss.backward()


def test_a_graph_of_the_gradients_is_refused_where_it_is_asked_for() -> None:
    model = wrap()
    pair, weights = views(), list(model.parameters())
    with pytest.raises(RuntimeError, match="create_graph=True asks for a graph of the gradients, and a local pass has"):
        torch.autograd.grad(model(*pair), weights, create_graph=True)
    loss = model(*pair)
    with (
        pytest.warns(UserWarning, match="reference cycle"),
        pytest.raises(RuntimeError, match="create_graph=True asks"),
    ):
        loss.backward(create_graph=True)
    with torch.enable_grad():
        loss.backward()  # nothing was taken of it
    assert_same(gradients(model), oracle(model, *pair)[1])


def test_a_units_loss_may_differentiate_twice() -> None:
    def gradient_penalty(one: Tensor, other: Tensor) -> Tensor:
        similarity = (one * other).tanh().sum()
        (gradient,) = torch.autograd.grad(similarity, one, create_graph=True)
        return similarity + gradient.square().sum()

    model = wrap(loss=gradient_penalty)
    pair = views()
    expected = oracle(model, *pair)[1]
    model(*pair).backward()
    assert_same(gradients(model), expected)


# ---------------------------------------------------------------- freezing and dropping


@pytest.mark.parametrize("overlap", [0, 1, 2])
@pytest.mark.parametrize("frozen", ["0", "1", "2", "01", "012"])
def test_frozen_stages_get_no_gradient_and_the_rest_the_right_one(frozen: str, overlap: int) -> None:
    backbone = small_net()
    for stage in frozen:
        backbone[int(stage)].requires_grad_(False)
    model = wrap(backbone, overlap=overlap)
    pair = views()
    losses, expected = oracle(model, *pair)
    torch.testing.assert_close(model.local_step(*pair), losses)
    assert_same(gradients(model), expected)
    assert not any(p.grad is not None for stage in frozen for p in backbone[int(stage)].parameters())


@pytest.mark.parametrize("entry", ["step", "call"])
def test_freezing_and_unfreezing_between_steps_hides_no_gradient(entry: str) -> None:
    model = wrap()
    for frozen in ([], [0], [1, 2], [], [0, 1, 2], [2], []):
        for stage in range(3):
            model.backbone[stage].requires_grad_(stage not in frozen)  # type: ignore[index]
        pair = views()
        model.zero_grad()
        expected = oracle(model, *pair)[1]
        run(model, pair, entry)
        assert_same(gradients(model), expected)


@pytest.mark.parametrize("entry", ["step", "call"])
def test_parts_that_run_in_some_steps_only(entry: str) -> None:
    backbone = SkipsAtRandom()
    model = wrap(backbone, stages=["a", "b", "c"])
    for backbone.runs in (True, False, True, False, True):
        pair = views()
        model.zero_grad()
        expected = oracle(model, *pair)[1]
        run(model, pair, entry)
        assert_same(gradients(model), expected)
        assert (backbone.extra.weight.grad is None) == (not backbone.runs)


def test_a_stage_that_no_unit_updates_stays_as_it_is() -> None:
    model = wrap(plan=Plan.windows(3, 1))
    model = wrap(plan=UpperOnly().plan(3, 2))
    pair = views()
    model.local_step(*pair)
    assert {name[:1] for name in gradients(model.backbone)} == {"0", "1", "2"}


# ---------------------------------------------------------------- hooks, clipping, optimisers


@pytest.mark.parametrize("entry", ["step", "call"])
def test_a_hook_on_a_weight_runs_once_on_the_whole_gradient(entry: str) -> None:
    model = wrap()
    pair = views()
    expected = oracle(model, *pair)[1]
    seen: list[Tensor] = []
    shared: Tensor = model.backbone[1].weight  # type: ignore[index, assignment]
    handle = shared.register_hook(lambda gradient: (seen.append(gradient), gradient * 3)[1])
    run(model, pair, entry)
    assert len(seen) == 1
    expected["backbone.1.weight"] = expected["backbone.1.weight"] * 3
    assert_same(gradients(model), expected)
    handle.remove()
    model.zero_grad()
    run(model, pair, entry)
    assert len(seen) == 1


@pytest.mark.parametrize("entry", ["step", "call"])
def test_hooks_after_accumulation_run_once(entry: str) -> None:
    model = wrap()
    counts: dict[str, int] = {}
    for name, weight in model.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda _, n=name: counts.__setitem__(n, counts.get(n, 0) + 1))
    run(model, views(), entry)
    assert counts == {name: 1 for name, _ in model.named_parameters()}


def test_an_optimiser_may_step_in_the_hook_after_accumulation() -> None:
    """A weight gets its gradient at its last use, so that changing it there invalidates no graph."""
    model, twin = wrap(), wrap()
    twin.load_state_dict(model.state_dict())
    pair = views()

    def descend(weight: Tensor) -> None:
        assert weight.grad is not None
        with torch.no_grad():
            weight -= 0.1 * weight.grad
        weight.grad = None

    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(descend)
    model.local_step(*pair)
    twin.local_step(*pair)
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    for (name, ours), (_, expected) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(ours, expected, msg=name)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adagrad", "LBFGS"])
def test_optimisers_and_schedulers_lower_the_loss(name: str) -> None:
    model = wrap()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    pair = views()
    first = model.local_step(*pair).sum()

    def closure() -> float:
        optimizer.zero_grad()
        return model.local_step(*pair).sum().item()

    for _ in range(10):
        closure()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(closure)
        scheduler.step()
    assert model.local_step(*pair).sum() < 0.9 * first


def test_channels_last() -> None:
    specimen = ZOO["resnet18"]
    model = LocalWrapper(specimen.build(), specimen.stages, decoder=specimen.decoder, example=specimen.views(2)[0])
    pair = specimen.views()
    expected = oracle(model, *pair)[1]
    model.to(memory_format=torch.channels_last)
    model.local_step(*(view.contiguous(memory_format=torch.channels_last) for view in pair))
    assert_same(gradients(model), expected)


def test_the_tail_is_left_out_of_training() -> None:
    backbone = nn.Sequential(small_net(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 5))
    model = wrap(backbone, stages=[0, 1])
    model.local_step(*views())
    assert {name.split(".")[0] for name in gradients(backbone)} == {"0", "1"}
    assert backbone[2].num_batches_tracked == 1


def test_views_get_no_gradient() -> None:
    model = wrap()
    first, second = views()
    first.requires_grad_()
    model.local_step(first, second)
    assert first.grad is None


@pytest.mark.parametrize("checkpoint", [False, True])
def test_saved_tensor_hooks_of_the_user_apply(checkpoint: bool) -> None:
    model = wrap(checkpoint=checkpoint)
    pair = views()
    expected = oracle(model, *pair)[1]
    with torch.autograd.graph.save_on_cpu():
        model.local_step(*pair)
    assert_same(gradients(model), expected)


def test_infonce_is_the_default_loss() -> None:
    assert isinstance(wrap().loss, InfoNCE)
