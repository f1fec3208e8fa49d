"""What people add to a backbone before, and do with it afterwards: adapters, parametrisations, export."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torchvision.models import resnet18
from zoo import ZOO, small_net

from locallearn import LocalWrapper, MLPDecoder, memory_report, plan_stages, stages_of
from locallearn.testing import assert_local_gradients


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, embed_dim=16, num_heads=2)


# ---------------------------------------------------------------- adapters


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("overlap", [0, 1])
def test_low_rank_adapters_alone_are_trained(overlap: int) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(vit(), peft.LoraConfig(r=2, target_modules=["qkv", "fc1"], init_lora_weights=False))
    net, pair = adapted.get_base_model().double(), torch.rand(2, 4, 3, 32, 32).unbind()
    assert stages_of(net, 4, pair[0]) == tuple(f"blocks.{k}" for k in range(4))
    model = LocalWrapper(net, stages_of(net, 4, pair[0]), overlap, example=pair[0])
    model.local_step(*pair)
    reached = {name for name, weight in net.named_parameters() if weight.grad is not None}
    assert reached == {name for name, _ in net.named_parameters() if "lora_" in name}
    assert_local_gradients(model, *pair)
    chosen = plan_stages(net, pair[0])
    assert sum(piece.weights for stage in chosen.pieces for piece in stage) == sum(
        weight.numel() for weight in net.parameters() if weight.requires_grad
    )


# ---------------------------------------------------------------- parametrisations


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.transpose(-1, -2)


PARAMETRISED: dict[str, Callable[[nn.Module], object]] = {
    "own": lambda module: parametrize.register_parametrization(module, "weight", Symmetric()),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
}


@pytest.mark.parametrize("kind", PARAMETRISED)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_parametrised_weights(kind: str, checkpoint: bool) -> None:
    net, pair = nn.Sequential(*small_net(), nn.Conv2d(4, 4, 3)), torch.rand(2, 4, 3, 12, 12).unbind()
    for layer in net:
        PARAMETRISED[kind](layer)
    plan = plan_stages(net, pair[0], 4)
    assert plan.stages == stages_of(net, 4, pair[0]) == ("0", "1", "2", "3")
    model = LocalWrapper(net, plan.stages, example=pair[0], checkpoint=checkpoint)
    model.eval()  # spectral_norm's vectors move in training
    assert_local_gradients(model, *pair)
    assert max(memory_report(model, *pair).predicted) > 0


def test_a_cached_parametrisation_over_a_whole_step_is_refused_or_right() -> None:
    """Inside of ``parametrize.cached()`` the weight is computed once for the whole step, its own stage's only."""
    net, pair = small_net(), torch.rand(2, 4, 3, 8, 8).unbind()
    PARAMETRISED["weight_norm"](net[1])
    model = LocalWrapper(net, [0, 1, 2], 0, decoder=MLPDecoder, example=pair[0])
    plain = model.local_step(*pair)
    expected = [weight.grad.clone() for weight in net.parameters() if weight.grad is not None]
    model.zero_grad()
    with parametrize.cached():
        torch.testing.assert_close(model.local_step(*pair), plain)
    for weight, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)


# ---------------------------------------------------------------- export of what was trained


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["resnet18", "vit"])
def test_the_trained_backbone_is_exported(name: str) -> None:
    specimen = ZOO[name]
    model = LocalWrapper(
        specimen.build().double(), specimen.stages, decoder=specimen.decoder, example=specimen.views()[0]
    )
    model.local_step(*specimen.views())
    net, images = model.unwrap().eval(), specimen.views()[0]
    with torch.no_grad():
        exported = torch.export.export(net, (images,))
        torch.testing.assert_close(exported.module()(images), net(images))
    assert exported.state_dict.keys() == net.state_dict().keys()


def test_export_does_not_mind_where_the_cuts_were_found() -> None:
    torch.set_default_dtype(torch.float32)
    net, images = resnet18().eval(), torch.rand(2, 3, 32, 32)
    LocalWrapper(net, "auto", example=images)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(net, (images,)).module()(images), net(images))
