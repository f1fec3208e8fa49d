"""The surface of LocalWrapper: what it returns, keeps and hands on; and the backbone stays the user's."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from oracle import assert_same, gradients, oracle
from torch import Tensor, nn
from torchvision.models import resnet18
from zoo import ZOO, small_net

from locallearn import InfoNCE, LocalWrapper, MLPDecoder, Plan, Soft, UpperOnly, fused, sequential

EXAMPLE = (2, 3, 8, 8)


def views() -> tuple[Tensor, ...]:
    return torch.rand(2, 4, 3, 8, 8).unbind()


def wrap(backbone: nn.Module | None = None, **options: object) -> LocalWrapper:
    options = {"stages": [0, 1, 2], "decoder": MLPDecoder, "example": torch.rand(EXAMPLE), **options}
    return LocalWrapper(small_net() if backbone is None else backbone, **options)  # type: ignore[arg-type]


# ---------------------------------------------------------------- what comes out


def test_local_step_returns_the_units_losses_detached() -> None:
    model = wrap()
    losses = model.local_step(*views())
    assert losses.shape == (2,)
    assert not losses.requires_grad
    assert model.losses is losses


def test_call_returns_the_sum_of_the_units_losses() -> None:
    model = wrap()
    total = model(*views())
    assert total.shape == ()
    torch.testing.assert_close(total.detach(), model.losses.sum())  # type: ignore[union-attr]


def test_the_readme_line_builds_the_papers_loco() -> None:
    model = LocalWrapper(resnet18(), stages=["layer1", "layer2", "layer3", "layer4"], overlap=1)
    assert model.plan == Plan.windows(4, 1)
    assert [(u.first, u.last, u.updates) for u in model.plan.units] == [(0, 1, (0, 1)), (1, 2, (1, 2)), (2, 3, (2, 3))]
    assert isinstance(model.decoders, nn.ModuleList)
    assert [d.channels for d in model.decoders] == [128, 256, 512]
    assert " ".join(map(str, model.schedule(model.plan))) == "F0 F1 T0 F2 T1 F3 T2"
    for fixed in ("plan", "schedule"):  # decoders and losses were made for them
        with pytest.raises(AttributeError):
            setattr(model, fixed, None)


def test_stages_may_be_names_modules_or_indices() -> None:
    backbone = nn.Sequential(small_net(), small_net_on(4), small_net_on(4))
    for stages in (["0.1", "1", "2"], [backbone[0][1], backbone[1], backbone[2]]):
        model = wrap(backbone, stages=stages)
        assert model.stages == ("0.1", "1", "2")
    assert wrap(backbone, stages=[0, -1]).stages == ("0", "2")


def small_net_on(width: int) -> nn.Module:
    return nn.Conv2d(width, width, 3, padding=1)


def test_decoders_may_be_a_list_one_per_unit() -> None:
    ready = [MLPDecoder(4), nn.Sequential(nn.Flatten(), nn.Linear(256, 3))]
    model = wrap(decoder=ready)
    assert list(model.decoders) == ready


def test_decoders_follow_the_backbones_dtype_and_device() -> None:
    model = wrap(small_net().to(torch.float32), example=torch.rand(EXAMPLE, dtype=torch.float32))
    assert {p.dtype for p in model.decoders.parameters()} == {torch.float32}
    on_meta = wrap(small_net().to("meta"), example=None)
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}


def test_under_no_grad_it_only_evaluates() -> None:
    model = wrap().eval()
    pair = views()
    expected = oracle(model, *pair)[0].sum()
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            total = model(*pair)
        assert not total.requires_grad
        torch.testing.assert_close(total, expected)
    assert not gradients(model)


def test_local_step_under_no_grad_is_refused() -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"gradients are disabled.*model\(\*views\)"):
        wrap().local_step(*views())


def test_frozen_everything_only_evaluates() -> None:
    model = wrap().requires_grad_(False)
    assert model.local_step(*views()).shape == (2,)
    assert not gradients(model)


# ---------------------------------------------------------------- one forward


@pytest.mark.parametrize("schedule", [sequential, fused])
@pytest.mark.parametrize("name", ZOO)
def test_each_stage_runs_once_and_statistics_are_those_of_one_plain_forward(name: str, schedule: object) -> None:
    specimen = ZOO[name]
    backbone = specimen.build()
    model = LocalWrapper(
        backbone,
        specimen.stages,
        decoder=specimen.decoder,
        schedule=schedule,
        example=specimen.views(2)[0],  # type: ignore[arg-type]
    )
    twin = copy.deepcopy(backbone)
    calls: dict[str, int] = {}
    for module_name, module in backbone.named_modules():
        module.register_forward_hook(lambda *_, n=module_name: calls.__setitem__(n, calls.get(n, 0) + 1))
    pair = specimen.views()
    state = torch.get_rng_state()
    model.local_step(*pair)
    torch.set_rng_state(state)
    plain_calls: dict[str, int] = {}
    for module_name, module in twin.named_modules():
        module.register_forward_hook(lambda *_, n=module_name: plain_calls.__setitem__(n, plain_calls.get(n, 0) + 1))
    twin(torch.cat(pair))
    assert calls == plain_calls
    for (buffer_name, buffer), (_, expected) in zip(backbone.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), buffer_name


def test_at_most_overlap_plus_one_segments_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    from locallearn._walk import segment

    alive: weakref.WeakSet[object] = weakref.WeakSet()
    most = [0]
    create = segment.Segment.__init__

    def counted(self: object, outlet: Tensor, inlet: Tensor | None) -> None:
        create(self, outlet, inlet)  # type: ignore[arg-type]
        alive.add(self)
        most[0] = max(most[0], len(alive))

    backbone = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(8)])
    for overlap in range(4):
        model = wrap(backbone, stages=list(range(8)), overlap=overlap)
        gc.disable()
        monkeypatch.setattr(segment.Segment, "__init__", counted)
        most[0] = 0
        model.local_step(*views())
        monkeypatch.undo()
        gc.enable()
        assert most[0] == overlap + 1
        assert not alive


# ---------------------------------------------------------------- the backbone stays the user's


@pytest.mark.parametrize("name", ZOO)
def test_the_backbone_is_the_same_object_with_the_same_keys_and_outputs(name: str) -> None:
    specimen = ZOO[name]
    backbone = specimen.build()
    batch = specimen.views(2)[0]
    keys = list(backbone.state_dict())
    reference = copy.deepcopy(backbone)
    model = LocalWrapper(backbone, specimen.stages, decoder=specimen.decoder, example=batch)
    assert model.backbone is backbone is model.unwrap()
    assert list(backbone.state_dict()) == keys
    model.local_step(*specimen.views())
    reference.load_state_dict(backbone.state_dict())
    for mode in (True, False):
        backbone.train(mode)
        reference.train(mode)
        state = torch.get_rng_state()
        ours = backbone(batch)
        torch.set_rng_state(state)
        assert torch.equal(ours, reference(batch))


def test_saved_from_the_wrapper_loads_into_a_plain_torchvision_model(tmp_path: Path) -> None:
    model = LocalWrapper(resnet18(), ["layer1", "layer2"], decoder=MLPDecoder, example=torch.rand(2, 3, 32, 32))
    model.local_step(*torch.rand(2, 2, 3, 32, 32).unbind())
    torch.save(model.backbone.state_dict(), tmp_path / "backbone.pt")
    plain = resnet18()
    plain.load_state_dict(torch.load(tmp_path / "backbone.pt"))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(plain.eval()(images), model.backbone.eval()(images))


def trained() -> LocalWrapper:
    model = wrap()
    model.local_step(*views())
    model(*views()).backward()
    model.zero_grad()
    return model


@pytest.mark.parametrize(
    "options", [{}, {"sharing": Soft()}, {"sharing": UpperOnly()}, {"loss": [InfoNCE(), InfoNCE()]}]
)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_wrapper_trains_by_itself(copied, options: dict[str, object]) -> None:  # type: ignore[no-untyped-def]
    model = wrap(**options)
    model.local_step(*views())
    model.zero_grad()
    twin = copied(model)
    pair = views()
    twin.local_step(*pair)
    assert not gradients(model)
    model.local_step(*pair)
    assert_same(gradients(twin), gradients(model))


def test_copies_of_the_backbone_carry_nothing_of_the_wrapper() -> None:
    backbone = trained().backbone
    images = torch.rand(EXAMPLE)
    buffer = io.BytesIO()
    torch.save(backbone, buffer)
    assert b"locallearn" not in buffer.getvalue()
    assert b"locallearn" not in pickle.dumps(backbone)
    buffer.seek(0)
    for plain in (copy.deepcopy(backbone), torch.load(buffer, weights_only=False)):
        assert torch.equal(plain(images), backbone(images))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())


def test_script_and_export_of_the_backbone_are_plain() -> None:
    backbone = trained().backbone.eval()
    images = torch.rand(EXAMPLE)
    torch.testing.assert_close(torch.export.export(backbone, (images,)).module()(images), backbone(images))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, but in use
        scripted = torch.jit.script(backbone)
    torch.testing.assert_close(scripted(images), backbone(images))


def test_a_backbone_can_be_wrapped_again() -> None:
    backbone = small_net()
    for overlap in (0, 1, 2, 1):
        model = wrap(backbone, overlap=overlap)
        pair = views()
        expected = oracle(model, *pair)[1]
        model.local_step(*pair)
        assert_same(gradients(model), expected)
        backbone.zero_grad()


def test_users_hooks_survive_and_run_before_the_cut() -> None:
    backbone = small_net()
    backbone[0].register_forward_hook(lambda module, args, output: output * 2)
    model = wrap(backbone)
    pair = views()
    losses, expected = oracle(model, *pair)
    torch.testing.assert_close(model.local_step(*pair), losses)
    assert_same(gradients(model), expected)
    assert len(backbone[0]._forward_hooks) == 1


def test_printing_shows_the_parts() -> None:
    text = repr(wrap())
    assert "(backbone)" in text
    assert "(decoders)" in text
