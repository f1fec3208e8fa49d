"""Every tensor that the library makes lies where its input does: seen without a GPU, on meta and under fake CUDA tensors."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo import ZOO

from locallearn import (
    ConvMLPDecoder,
    InfoNCE,
    LocalWrapper,
    MLPDecoder,
    Soft,
    TokenDecoder,
    UpperOnly,
    fused,
    info_nce,
    memory_report,
    plan_stages,
)

LOSSES: dict[str, dict[str, Any]] = {
    "nt-xent": {},
    "two-way": {"form": "two-way"},
    "one-way": {"form": "one-way"},
    "whole matrix": {"tile": 0},
    "labels": {"labels": True},
    "labels ignored": {"labels": True, "same_label": "ignore"},
    "queue": {"negatives": (9, 16)},
    "own negatives": {"negatives": (4, 9, 16)},
    "top 1": {"return_top1": True},
    "each": {"reduction": "none"},
    "learnt temperature": {"temperature": True},
}


class Only(TorchDispatchMode):
    """Refuses an operator that makes a tensor on another device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.operators = device, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = {t.device.type for t in tree_leaves(result) if isinstance(t, Tensor)}
        self.operators += 1
        assert made <= {self.device}, f"{func} made a tensor on {made}"
        return result


def loss_on(device: str, settings: dict[str, Any]) -> Tensor:
    """One of LOSSES, with its backward where there is a device for it."""
    settings = dict(settings)
    views = [torch.empty(4, 16, device=device, requires_grad=True) for _ in range(2)]
    if settings.pop("labels", False):
        settings["labels"] = torch.empty(4, dtype=torch.long, device=device)
    if size := settings.pop("negatives", None):
        settings["negatives"] = torch.empty(size, device=device)
    if settings.pop("temperature", False):
        settings["temperature"] = torch.ones((), device=device, requires_grad=True)
    with Only(device):
        result = info_nce(*views, **settings)
        loss = (result[0] if isinstance(result, tuple) else result).sum()
        if device == "meta":
            loss.backward()
    return loss


@pytest.mark.parametrize("name", LOSSES)
def test_losses_on_meta(name: str) -> None:
    assert loss_on("meta", LOSSES[name]).is_meta


@pytest.mark.parametrize("name", LOSSES)
def test_losses_on_fake_cuda(name: str) -> None:
    with FakeTensorMode():
        assert loss_on("cuda", LOSSES[name]).is_cuda


@pytest.mark.parametrize(
    ("decoder", "shape"),
    [
        (MLPDecoder, (4, 8)),
        (MLPDecoder, (4, 8, 6, 6)),
        (ConvMLPDecoder, (4, 8, 6, 6)),
        (partial(ConvMLPDecoder, blocks=(1, 2), widths=(8, 16)), (4, 8, 6, 6)),
        (TokenDecoder, (4, 5, 8)),
        (partial(TokenDecoder, class_token=True), (4, 5, 8)),
    ],
)
def test_decoders_on_meta_and_fake_cuda(decoder: Any, shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        module, features = decoder(8), torch.empty(shape)
    with Only("meta"):
        module(features).sum().backward()
    with FakeTensorMode(), torch.device("cuda"):
        module, features = decoder(8), torch.empty(shape)
        with Only("cuda"):
            assert module(features).is_cuda


def wrapped(name: str, device: str, **options: Any) -> tuple[LocalWrapper, list[Tensor]]:
    specimen = ZOO[name]
    with torch.device(device):
        backbone, (example, *views) = specimen.build(), torch.empty(3, 4, 3, specimen.size, specimen.size)
        return LocalWrapper(backbone, specimen.stages, decoder=specimen.decoder, example=example, **options), views


@pytest.mark.parametrize("entry", ["local_step", "forward"])
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_whole_pass_on_meta(name: str, entry: str, checkpoint: bool) -> None:
    model, views = wrapped(name, "meta", checkpoint=checkpoint)
    with Only("meta") as seen:
        if entry == "local_step":
            model.local_step(*views)
        else:
            model(*views).backward()
    assert seen.operators > 50
    assert any(weight.grad is not None for weight in model.backbone.parameters())


@pytest.mark.parametrize(
    "options",
    [{"overlap": 0}, {"overlap": 2}, {"sharing": UpperOnly()}, {"schedule": fused}, {"loss": InfoNCE(form="two-way")}],
    ids=["overlap 0", "overlap 2", "upper only", "fused", "two-way"],
)
def test_other_settings_on_meta(options: dict[str, Any]) -> None:
    model, views = wrapped("convnext", "meta", **options)
    with Only("meta"):
        model.local_step(*views, grad_scale=torch.ones((), device="meta"))


def test_soft_sharing_on_meta() -> None:
    with torch.device("meta"):
        net = nn.Sequential(*(nn.Conv2d(3 if k == 0 else 4, 4, 3, padding=1) for k in range(3)))
        views = torch.empty(2, 4, 3, 8, 8)
        model = LocalWrapper(net, [0, 1, 2], sharing=Soft(), decoder=MLPDecoder, example=views[0])
    with Only("meta"):
        model.local_step(*views.unbind())
    assert model.penalty is not None
    assert model.penalty.is_meta


@pytest.mark.parametrize(
    "name", ["resnet18", "shufflenet", "sequential"]
)  # the others read numbers while they are built
@pytest.mark.parametrize("checkpoint", [False, True])
def test_an_evaluation_on_fake_cuda(name: str, checkpoint: bool) -> None:
    """Without a device, autograd cannot run a backward there; the forward makes nothing elsewhere."""
    with FakeTensorMode():
        model, views = wrapped(name, "cuda", checkpoint=checkpoint)
        with Only("cuda"), torch.no_grad():
            assert model(*views).is_cuda


def test_plans_and_reports_of_a_backbone_on_meta() -> None:
    model, views = wrapped("sequential", "meta")
    assert len(plan_stages(model.backbone, views[0], 2, decoder=MLPDecoder).stages) == 2
    assert max(memory_report(model, *views).predicted) > 0
