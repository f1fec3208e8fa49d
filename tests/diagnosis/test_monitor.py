"""The monitor: what it sees is what was there, and training does not notice it."""

from __future__ import annotations

import pickle
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diagnosis.state import state_of
from torch import Tensor, nn

from locallearn import InfoNCE, LocalWrapper, MLPDecoder, Soft, fused, info_nce, memory_report
from locallearn.diagnosis import DivergedError, Monitor, Watch, effective_rank, gradient_agreement, spread


def wrapped(**settings: Any) -> LocalWrapper:
    layers = [
        nn.Sequential(nn.Conv2d(3 if k == 0 else 6, 6, 3, padding=1), nn.Tanh(), nn.Dropout(0.1)) for k in range(4)
    ]
    return LocalWrapper(nn.Sequential(*layers), [0, 1, 2, 3], **{"overlap": 1, "decoder": MLPDecoder} | settings)


def views(count: int = 6) -> tuple[Tensor, Tensor]:
    one, two = torch.rand(2, count, 3, 8, 8)
    return one, two


def embeddings(model: LocalWrapper, pair: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Each unit's, for the same random numbers as the pass before."""
    outlets, features = [], torch.cat(pair)
    for stage in model.backbone:
        features = stage(features)
        outlets.append(features)
    return [
        decoder(outlets[unit.last]).detach() for unit, decoder in zip(model.plan.units, model.decoders, strict=True)
    ]


@pytest.mark.parametrize("schedule", [None, fused])
@pytest.mark.parametrize("losses", [InfoNCE, lambda: [InfoNCE(0.2), InfoNCE(), InfoNCE(form="one-way")]])
def test_it_reads_what_every_unit_did(schedule: Any, losses: Any) -> None:
    model, pair = wrapped(loss=losses(), **{} if schedule is None else {"schedule": schedule}), views()
    model.backbone.eval()
    twin = deepcopy(model)
    with Monitor(model, every=1) as monitor:
        assert monitor.read() == {}
        assert not monitor.due
        model.local_step(*pair)
        assert monitor.due
        flat = monitor.read()
        assert not monitor.due
    each = twin.loss if isinstance(twin.loss, nn.ModuleList) else [twin.loss] * 3
    for k, (z, loss) in enumerate(zip(embeddings(twin, pair), each, strict=True)):
        value, top1 = loss(*z.chunk(2), return_top1=True)
        assert flat[f"loss/unit_{k}"] == pytest.approx(value.item())
        assert flat[f"top1/unit_{k}"] == pytest.approx(top1.item())
        assert flat[f"spread/unit_{k}"] == pytest.approx(spread(z).item())
        assert flat[f"effective_rank/unit_{k}"] == pytest.approx(effective_rank(z))
    assert len(flat) == 12
    assert all(type(value) is float for value in flat.values())


@pytest.mark.parametrize("call", ["step", "backward"])
def test_training_does_not_notice_it(call: str) -> None:
    model = wrapped(checkpoint=True)
    other, pairs = deepcopy(model), [views() for _ in range(4)]
    states = []
    for trained in (model, other):
        torch.manual_seed(1)
        monitor = Monitor(trained, every=2) if trained is model else None
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for pair in pairs:
            if call == "step":
                trained.local_step(*pair)
            else:
                trained(*pair).backward()
            optimizer.step()
            if monitor is not None and monitor.due:
                monitor.read()
        if monitor is not None:
            monitor.close()
        states.append(state_of(trained) | {"losses": trained.losses.tolist()})
    one, two = states
    for kind in ("tensors", "gradients"):
        for name, tensor in one[kind].items():
            assert tensor is None or torch.equal(tensor, two[kind][name]), name
    assert one["rest"] == two["rest"]
    assert torch.equal(one["random"], two["random"])
    assert one["losses"] == two["losses"]


def test_every_nth_training_pass_is_due() -> None:
    model, due = wrapped(), []
    monitor = Monitor(model, every=3)
    for step in range(8):
        model.local_step(*views())
        with torch.no_grad():
            model(*views())  # an evaluation is none
        if monitor.due:
            due.append(step)
            monitor.read()
    assert due == [0, 3, 6]
    assert [at for at, _ in monitor.history] == [1, 4, 7]


def test_an_evaluation_in_between_is_not_taken_for_the_step() -> None:
    model = wrapped()
    monitor = Monitor(model, every=1)
    losses = model.local_step(*views())
    with torch.no_grad():
        model(*views())
    assert monitor.due
    assert [monitor.read()[f"loss/unit_{k}"] for k in range(3)] == losses.tolist()


def test_nothing_but_the_loss_where_there_is_nothing_else() -> None:
    model = wrapped(decoder=lambda width: nn.Identity(), loss=lambda a, b: (a - b).square().mean())
    monitor = Monitor(model, every=1)
    model.local_step(*views())
    assert [*monitor.read()] == ["loss/unit_0", "loss/unit_1", "loss/unit_2"]
    assert [*monitor.measured()] == ["loss"]


def test_top1_is_that_of_an_infonce_inside_of_a_loss_and_absent_elsewhere() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = InfoNCE(return_top1=True)

        def forward(self, *outputs: Tensor) -> Tensor:
            value, top1 = self.inner(*outputs)
            assert 0 <= top1 <= 1
            return value

    model = wrapped(loss=[Own(), info_nce, InfoNCE()])
    monitor = Monitor(model, every=1)
    model.local_step(*views())
    flat = monitor.read()
    assert [name for name in flat if "top1" in name] == ["top1/unit_0", "top1/unit_2"]
    assert monitor.measured()["top1"].isnan().tolist() == [False, True, False]


def test_two_monitors_see_the_same_and_a_loss_that_is_called_by_itself_is_no_units() -> None:
    model = wrapped(loss=[InfoNCE(), InfoNCE(), lambda a, b: (a - b).square().mean()])
    one, other = Monitor(model, every=1), Monitor(model, every=1)
    model.local_step(*views())
    alone = model.loss[0](*torch.randn(2, 4, 8))
    assert isinstance(alone, Tensor)
    flat = one.read()
    assert flat == other.read()
    assert [name for name in flat if "top1" in name] == ["top1/unit_0", "top1/unit_1"]


def test_the_penalty_is_read_too() -> None:
    model = wrapped(sharing=Soft(0.1))
    monitor = Monitor(model, every=1)
    model.local_step(*views())
    assert monitor.read()["penalty"] == model.penalty.item()


def test_copies_and_pickles_carry_no_monitor() -> None:
    model = wrapped()
    monitor = Monitor(model, every=1)
    for copied in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.local_step(*views())
        assert not monitor.due
        assert Monitor(copied, every=1).read() == {}
    gradient_agreement(model, *views())
    memory_report(model, *views())
    assert not monitor.due
    model.local_step(*views())
    assert monitor.due


def test_after_close_nothing_is_left() -> None:
    model = wrapped()
    before = state_of(model)["rest"]
    monitor = Monitor(model, every=1)
    assert state_of(model)["rest"] != before
    monitor.close()
    monitor.close()
    assert state_of(model)["rest"] == before
    model.local_step(*views())
    assert not monitor.due


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks for it
def test_compiled_decoders_are_monitored() -> None:
    torch.compiler.reset()
    model = wrapped()
    compiled = [decoder.compile(backend="eager") or decoder._compiled_call_impl for decoder in model.decoders]
    model.local_step(*views())  # compiled before it is monitored
    with Monitor(model, every=1) as monitor:
        model.local_step(*views())
        assert len(monitor.read()) == 12
        assert not Monitor(deepcopy(model)).read()
    assert [decoder._compiled_call_impl for decoder in model.decoders] == compiled


def test_it_never_reads_a_device_before_read() -> None:
    """Tensors on the meta device have no numbers: any `.item()`, `bool()` or `.cpu()` of one would fail."""
    model = wrapped().to("meta")
    monitor = Monitor(model, every=2)
    for _ in range(4):
        model.local_step(*torch.empty(2, 6, 3, 8, 8, device="meta"))
        assert monitor.due in (True, False)
        assert {tensor.device.type for tensor in monitor.measured().values()} == {"meta"}
    assert [*monitor.measured()] == ["loss", "top1", "spread"]


def test_a_collapse_is_told_with_the_unit_once_it_has_settled() -> None:
    told: list[str] = []
    model = wrapped()
    model.backbone.eval()
    monitor = Monitor(model, every=1, settle=2, warn=told.append)
    for _ in range(4):
        model.local_step(*torch.ones(2, 6, 3, 8, 8))
        monitor.read()
    assert [line.split(" (")[0] for line in told] == [f"unit {k}: it collapses" for k in range(3)]
    loud = Monitor(model, every=1, settle=0)
    model.local_step(*torch.ones(2, 6, 3, 8, 8))
    with pytest.warns(RuntimeWarning, match=r"unit \d: it collapses") as caught:
        loud.read()
    assert len(caught) == 3
    assert caught[0].filename == __file__


def test_a_loss_that_is_no_number_is_told_and_then_stops_the_run() -> None:
    told: list[str] = []
    model = wrapped(loss=[InfoNCE(), lambda a, b: (a - b).sum() * torch.nan, InfoNCE()])
    monitor = Monitor(model, every=4, warn=told.append, patience=5)
    for _ in range(4):
        model.local_step(*views())
    monitor.read()
    assert [line.split(" (")[0] for line in told] == ["unit 1: its loss is not finite"]
    model.local_step(*views())
    with pytest.raises(DivergedError, match="the loss of unit 1 has not been finite for 5 steps in a row; lower"):
        monitor.read()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Monitor(model).read()  # nothing seen, nothing told


def test_losses_that_are_not_finite_are_told_and_then_stop_the_run() -> None:
    watch, bad = Watch(2), torch.tensor([1.0, torch.nan])
    told = "unit 1: its loss is not finite (std of its embeddings 1.000, evenly spread 1)"
    watch.see(bad)
    assert not watch.healthy
    assert watch.judge([1, 1]) == [told]
    watch.see(torch.ones(2))  # fp16's scaler had skipped it
    assert watch.healthy
    assert watch.judge([1, None]) == []
    for _ in range(4):
        watch.see(bad)
    assert watch.judge([1, None], patience=5) == ["unit 1: its loss is not finite"]
    watch.see(bad)
    assert watch.judge([1, 1]) == []
    with pytest.raises(DivergedError, match="the loss of unit 1 has not been finite for 5 steps in a row; lower"):
        watch.judge([1, 1], patience=5)


def test_a_collapse_is_told_once_each_time_it_comes() -> None:
    watch = Watch(2)
    watch.see(torch.tensor([1.0, 1.0]))
    assert watch.judge([0.9, 0.05]) == ["unit 1: it collapses (std of its embeddings 0.050, evenly spread 1)"]
    assert watch.judge([0.9, 0.04]) == []
    assert watch.judge([0.9, 0.9]) == []
    assert len(watch.judge([0.01, 0.02])) == 2


def test_what_it_has_read_is_drawn(tmp_path: Path) -> None:
    model = wrapped()
    monitor = Monitor(model, every=1)
    with pytest.raises(ValueError, match="nothing to draw"):
        monitor.save(tmp_path / "units.png")
    for _ in range(3):
        model.local_step(*views())
        monitor.read()
    monitor.save(tmp_path / "units.png")
    assert (tmp_path / "units.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_monitored_is_refused() -> None:
    with pytest.raises(TypeError, match="looked at in a LocalWrapper; got Sequential"):
        Monitor(wrapped().backbone)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        Monitor(wrapped(), every=0)
    for settings in ({"every": 1.5}, {"every": "x"}, {"settle": None}, {"patience": 2.5}):
        with pytest.raises(TypeError, match=rf"{next(iter(settings))}, .* is a whole number, at least \d; got"):
            Monitor(wrapped(), **settings)
    for patience in (0, -1):
        with pytest.raises(ValueError, match=f"patience, .* at least 1; got {patience}"):
            Monitor(wrapped(), patience=patience)
    with pytest.raises(TypeError, match="warn is called with a line; got 'print'"):
        Monitor(wrapped(), warn="print")


def test_all_that_diverge_are_named() -> None:
    watch = Watch(3)
    watch.see(torch.tensor([torch.nan, 1.0, torch.inf]))
    with pytest.raises(DivergedError, match=r"^the losses of units 0 and 2 have not been finite for 1 steps in a row"):
        watch.judge([None] * 3, patience=1)
