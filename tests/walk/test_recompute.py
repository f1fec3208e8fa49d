"""What is recomputed gives the same gradients, random numbers and statistics, and only while a local pass runs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_same, gradients
from test_local_pass import ENTRIES, PLANS, SCHEDULES, compare
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.models import resnet18, resnet50
from torchvision.models.resnet import BasicBlock, Bottleneck
from zoo import ZOO, Chain, conv, small_net

from locallearn import ConvMLPDecoder, LocalWrapper, MLPDecoder, Soft
from locallearn._fitting.recomputed import runs
from locallearn._walk import recompute
from locallearn.memory import measure

ABC = ["a", "b", "c"]


def views(size: int = 8) -> tuple[Tensor, ...]:
    return torch.rand(2, 4, 3, size, size).unbind()


def wrap(backbone: nn.Module, stages: Any, **options: Any) -> LocalWrapper:
    return LocalWrapper(backbone, stages, **{"decoder": MLPDecoder, "example": torch.rand(2, 3, 8, 8), **options})


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("backbone", ZOO)
@pytest.mark.parametrize("plan", ["overlap 0", "overlap 1", "overlap 2", "gaps in updates", "nothing below"])
def test_gradients_equal_the_oracle_when_blocks_are_recomputed(backbone: str, plan: str) -> None:
    specimen = ZOO[backbone]
    turn = (list(ZOO).index(backbone) + list(PLANS).index(plan)) % 4
    model = LocalWrapper(
        specimen.build(),
        specimen.stages,
        plan=PLANS[plan](len(specimen.stages)),
        decoder=specimen.decoder,
        schedule=list(SCHEDULES.values())[turn % 2],
        example=specimen.views(2)[0],
        checkpoint=True,
    )
    assert model._runs
    compare(model, specimen.views(), list(ENTRIES)[turn // 2])


def test_gradients_equal_the_oracle_under_soft_sharing() -> None:
    specimen = ZOO["resnet18"]
    model = LocalWrapper(
        specimen.build(),
        specimen.stages,
        sharing=Soft(0.0),
        decoder=specimen.decoder,
        example=specimen.views(2)[0],
        checkpoint=BasicBlock,
    )
    compare(model, specimen.views(), "step")


class Norms(Chain):
    """Every kind of buffer that a forward changes, behind dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.a = self.block(nn.BatchNorm2d(4))
        self.b = self.block(nn.BatchNorm2d(4, momentum=None))
        self.c = self.block(nn.InstanceNorm2d(4, affine=True, track_running_stats=True))

    @staticmethod
    def block(norm: nn.Module) -> nn.Sequential:
        return nn.Sequential(spectral_norm(conv(4, 4)), norm, nn.Dropout(0.3), nn.ReLU(inplace=True), conv(4, 4))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_buffers_random_numbers_and_gradients_are_those_of_one_forward(entry: str, schedule: str) -> None:
    backbone = Norms()
    options = {"decoder": lambda c: MLPDecoder(c, out_features=16), "schedule": SCHEDULES[schedule]}
    plain = wrap(backbone, ABC, **options)
    again = wrap(copy.deepcopy(backbone), ABC, **options, checkpoint=nn.Sequential)
    again.load_state_dict(plain.state_dict())
    for _ in range(3):
        pair, state = views(), torch.get_rng_state()
        ENTRIES[entry](plain, *pair)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        ENTRIES[entry](again, *pair)
        assert torch.equal(after, torch.get_rng_state())
        assert_same(gradients(again), gradients(plain))
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(again.get_buffer(name), buffer, msg=name)
        plain.zero_grad()
        again.zero_grad()
    assert backbone.b[1].num_batches_tracked == 3


@pytest.mark.parametrize("entry", ENTRIES)
def test_bf16_autocast_is_the_same_when_recomputed(entry: str) -> None:
    torch.set_default_dtype(torch.float32)
    backbone, pair = Norms(), views()
    plain, again = (wrap(copy.deepcopy(backbone), ABC, checkpoint=policy) for policy in (False, nn.Sequential))
    again.load_state_dict(plain.state_dict())
    for model in (plain, again):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = model.local_step(*pair) if entry == "step" else model(*pair)
        if entry == "call":
            losses.backward()
    assert_same(gradients(again), gradients(plain), tolerance=0)


def test_one_inside_of_another_is_recomputed_too() -> None:
    specimen = ZOO["resnet18"]
    for overlap in (0, 1, 2):
        model = LocalWrapper(
            specimen.build(),
            specimen.stages,
            overlap,
            specimen.decoder,
            example=specimen.views(2)[0],
            checkpoint=(True, nn.Sequential),
        )
        compare(model, specimen.views(), "step")


# ---------------------------------------------------------------- what is chosen


def chosen(backbone: nn.Module, cuts: list[str], policy: Any = True, size: int = 64) -> list[str]:
    return ["+".join(run) for run in runs(backbone, cuts, policy, torch.rand(2, 3, size, size))]


def test_true_means_every_block_and_the_stem() -> None:
    blocks = [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
    assert chosen(resnet18(), ["layer2", "layer4"]) == ["conv1+bn1+relu+maxpool", *blocks]


def test_a_run_of_simple_layers_ends_with_its_stage() -> None:
    net = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), nn.Tanh(), nn.MaxPool2d(2), conv(4, 4))
    assert chosen(net, ["6"], size=8) == ["0+1+2", "3+4+5"]
    assert chosen(net, ["1", "4", "6"], size=8) == ["0+1", "3+4"]


def test_dropout_between_layers_parts_them() -> None:
    net = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU(), conv(4, 4))
    assert chosen(net, ["4"], size=8) == ["0+1"]
    compare(wrap(net, ["1", "4"], checkpoint=True), views(), "step")


@pytest.mark.parametrize(
    "policy", [BasicBlock, (BasicBlock, Bottleneck), lambda module: isinstance(module, BasicBlock)]
)
def test_a_policy_is_a_class_several_or_a_callable(policy: Any) -> None:
    assert chosen(resnet18(), ["layer2", "layer4"], policy) == [
        f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)
    ]


@pytest.mark.parametrize(
    ("policy", "kind", "message"),
    [
        ("blocks", TypeError, "a class of modules such as checkpoint=Bottleneck.*got 'blocks'"),
        (Bottleneck, ValueError, "chooses no submodule of ResNet; it is made of .*'BasicBlock'"),
        (nn.Sequential, ValueError, r"inside of which stages end: {'layer1': \['layer1.0'\]}"),
    ],
)
def test_other_policies_are_refused(policy: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        LocalWrapper(resnet18().double(), ["layer1.0", "layer2", "layer4"], checkpoint=policy)


class FlipsInTraining(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.norm(x.flip(-1) if self.training else x)
        return self.b(self.a(x))


def test_a_run_that_is_none_in_training_is_refused_there() -> None:
    model = wrap(FlipsInTraining(), ["a", "b"], checkpoint=True)
    with pytest.raises(RuntimeError, match=r"'norm' does not take the output of 'stem' as it is"):
        model.local_step(*views())
    assert_plain(model.backbone)


def test_a_block_that_changes_its_input_in_place_is_refused() -> None:
    net = nn.Sequential(conv(3, 4), nn.Sequential(nn.ReLU(inplace=True), conv(4, 4)), conv(4, 4))
    model = wrap(net, ["0", "1", "2"], checkpoint=nn.Sequential)
    with pytest.raises(RuntimeError, match="'1' changes its input in place, and cannot be recomputed from it"):
        model.local_step(*views())
    assert_plain(net)


# ---------------------------------------------------------------- only while a pass runs


def assert_plain(backbone: nn.Module) -> None:
    for module in backbone.modules():
        assert not {"forward", "_compiled_call_impl"} & module.__dict__.keys()
    pickle.loads(pickle.dumps(backbone))


def test_outside_of_a_pass_the_backbone_is_plain() -> None:
    model = wrap(small_net(), ["0", "1", "2"], checkpoint=lambda module: isinstance(module, nn.Conv2d))
    seen: list[bool] = []
    handle = model.backbone[1].register_forward_hook(lambda module, *_: seen.append("forward" in module.__dict__))
    model.local_step(*views())
    assert seen == [True]  # and not again when it is recomputed
    handle.remove()
    assert_plain(model.backbone)
    compare(copy.deepcopy(model), views(), "step")


def test_a_forward_of_the_users_own_comes_back() -> None:
    net = small_net()
    net[1].forward = own = lambda x: x * 2
    wrap(net, ["0", "1", "2"], checkpoint=nn.Conv2d).local_step(*views())
    assert net[1].forward is own


def test_hooks_inside_of_a_run_see_what_they_would_see() -> None:
    net = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4))
    model = wrap(net, ["2", "3"], checkpoint=True)
    pair = views()
    inputs: list[Tensor] = []
    net[1].register_forward_hook(lambda module, args, output: inputs.append(args[0].detach()))
    model.local_step(*pair)
    torch.testing.assert_close(inputs, [net[0](torch.cat(pair))])


def test_a_decoder_that_runs_the_backbone_finds_it_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    net, calls = small_net(), []
    original = recompute.checkpoint
    monkeypatch.setattr(
        recompute, "checkpoint", lambda *args, **options: (calls.append(1), original(*args, **options))[1]
    )

    class Peeks(MLPDecoder):
        def forward(self, features: Tensor) -> Tensor:
            net(torch.rand(2, 3, 8, 8))
            return super().forward(features)

    wrap(net, ["0", "1", "2"], decoder=Peeks, checkpoint=nn.Conv2d).local_step(*views())
    assert len(calls) == 3


# ---------------------------------------------------------------- memory


def saved(policy: Any, overlap: int = 1, decoder: Callable[[int], nn.Module] = ConvMLPDecoder) -> int:
    torch.set_default_dtype(torch.float32)
    with FakeTensorMode():
        model = LocalWrapper(resnet50(), [f"layer{k}" for k in range(1, 5)], overlap, decoder, checkpoint=policy)
        pair = torch.zeros(2, 32, 3, 224, 224).unbind()
        model.local_step(*pair)
        return measure(lambda: model.local_step(*pair)).saved_bytes


def test_a_resnet50_saves_more_than_three_and_a_half_times_less() -> None:
    assert saved(False, 3, MLPDecoder) >= 4.6 * saved(True)
