"""What only a CUDA device can tell: ``pytest -m cuda``; skipped where there is none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from curves.graphed import GraphedStep
from oracle import assert_same, gradients, oracle
from test_devices import LOSSES
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from zoo import ZOO, conv

from locallearn import LocalWrapper, MLPDecoder, info_nce
from locallearn.diagnosis import Monitor, gradient_agreement, stage_quality
from locallearn.testing import assert_local_gradients

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ENTRIES = ["local_step", "forward"]


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """No TF32, and kernels that give the same each time where there is a choice."""
    known = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = known


def wrapped(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[LocalWrapper, tuple[Tensor, ...]]:
    specimen = ZOO[name]
    backbone = specimen.build().to("cuda", dtype)
    views = tuple(view.to("cuda", dtype) for view in specimen.views())
    options = {"decoder": specimen.decoder, "example": views[0], **options}
    return LocalWrapper(backbone, specimen.stages, **options), views


def step(model: LocalWrapper, views: tuple[Tensor, ...], entry: str, **options: Any) -> None:
    if entry == "local_step":
        model.local_step(*views, **options)
    else:
        model(*views, **options).backward()


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """What runs inside leaves the device's random state as it was."""
    with torch.random.fork_rng([torch.cuda.current_device()]):
        yield


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("overlap", [0, 1])
def test_gradients_are_the_oracles(name: str, entry: str, checkpoint: bool, overlap: int) -> None:
    model, views = wrapped(name, checkpoint=checkpoint, overlap=overlap)
    with same_random_numbers():
        losses, expected = oracle(model, *views)
    step(model, views, entry)
    torch.testing.assert_close(model.losses, losses)
    assert_same(gradients(model), expected, tolerance=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["vit", "sequential"])  # which draw random numbers
def test_the_public_check_passes_and_replays_the_devices_random_numbers(name: str, dtype: torch.dtype) -> None:
    model, views = wrapped(name, dtype)
    state = torch.cuda.get_rng_state()
    assert_local_gradients(model, *views)
    assert torch.equal(state, torch.cuda.get_rng_state())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert_local_gradients(model, *views)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["resnet18", "convnext", "sequential"])
def test_channels_last(name: str, entry: str) -> None:
    model, views = wrapped(name)
    model.to(memory_format=torch.channels_last)
    views = tuple(view.contiguous(memory_format=torch.channels_last) for view in views)
    with same_random_numbers():
        expected = oracle(model, *views)[1]
    step(model, views, entry)
    assert_same(gradients(model), expected, tolerance=1e-8)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["resnet18", "vit"])
def test_autocast_to_bf16_is_as_close_as_plain_autograd_is(name: str, entry: str) -> None:
    model, views = wrapped(name, torch.float32)
    twin = copy.deepcopy(model)
    with same_random_numbers(), torch.autocast("cuda", dtype=torch.bfloat16):
        expected = oracle(model, *views)[1]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        step(twin, views, entry)
    assert_close_together(gradients(twin), expected, 0.1)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["resnet18", "vit"])
def test_autocast_to_fp16_with_a_scaler(name: str, entry: str) -> None:
    model, views = wrapped(name, torch.float32)
    with same_random_numbers(), torch.autocast("cuda", dtype=torch.float16):
        expected = oracle(model, *views)[1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    with torch.autocast("cuda", dtype=torch.float16):
        if entry == "local_step":
            model.local_step(*views, grad_scale=scaler.scale(torch.ones((), device="cuda")))
        else:
            loss = model(*views, grad_scale=scaler.get_scale())
    if entry == "forward":
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert_close_together(gradients(model), expected, 0.1)
    scaler.step(optimizer)
    scaler.update()


def assert_close_together(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """All gradients as one vector: by themselves the small ones are rounding."""
    assert ours.keys() == expected.keys()
    ours_, theirs = (torch.cat([grads[name].flatten().double() for name in expected]) for grads in (ours, expected))
    assert (ours_ - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # an import of torch's own
@pytest.mark.parametrize("entry", ENTRIES)
def test_compiled_blocks(entry: str) -> None:
    torch._dynamo.reset()
    net = nn.Sequential(conv(3, 4), *[nn.Sequential(BasicBlock(4, 4)) for _ in range(3)]).cuda()
    views = torch.rand(2, 4, 3, 8, 8, device="cuda").unbind()
    model = LocalWrapper(net, ["1", "2", "3"], decoder=MLPDecoder, example=views[0])
    losses, expected = oracle(model, *views)
    with torch._functorch.config.patch(donated_buffer=False):
        for stage in list(net)[1:]:
            stage[0].compile()
        step(model, views, entry)
    torch.testing.assert_close(model.losses, losses)
    assert_same(gradients(model), expected, tolerance=1e-8)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients_are_those_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    settings = dict(LOSSES[name])
    given = [torch.randn(4, 16).to(dtype) for _ in range(2)]
    if settings.pop("labels", False):
        settings["labels"] = torch.tensor([0, 1, 0, 2])
    if size := settings.pop("negatives", None):
        settings["negatives"] = torch.randn(size).to(dtype)
    if settings.pop("temperature", False):
        settings["temperature"] = torch.tensor(0.3)
    found = []
    for device in ("cpu", "cuda"):
        views = [view.to(device).requires_grad_() for view in given]
        there = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in settings.items()}
        result = info_nce(*views, **there)
        loss = (result[0] if isinstance(result, tuple) else result).sum()
        found.append([loss.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(loss, views))])
    close = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found[1], found[0], rtol=close, atol=close)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["resnet18", "vit"])
def test_a_step_waits_for_the_device_nowhere(name: str, entry: str, checkpoint: bool) -> None:
    model, views = wrapped(name, torch.float32, checkpoint=checkpoint)
    step(model, views, entry)  # what is learnt in the first step may wait
    scale = torch.ones((), device="cuda") if entry == "local_step" else None
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")  # warns once it is set
        step(model, views, entry, grad_scale=scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["resnet18", "shufflenet"])
def test_a_step_replayed_as_a_cuda_graph_gives_the_same_gradients(name: str) -> None:
    model, views = wrapped(name)
    graphed = GraphedStep(model)
    for k in range(GraphedStep.EAGER + 3):
        seen = tuple(view.roll(k, dims=-1) for view in views)
        losses, expected = oracle(model, *seen)
        model.zero_grad()
        torch.testing.assert_close(graphed(seen, None), losses)
        assert_same(gradients(model), expected, tolerance=1e-8)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_monitor_waits_for_the_device_only_when_it_is_read(entry: str) -> None:
    model, views = wrapped("resnet18", torch.float32)
    monitor = Monitor(model, every=1)
    step(model, views, entry)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")  # warns once it is set
        step(model, views, entry)
        assert monitor.due
        assert monitor.measured()["spread"].is_cuda
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(monitor.read()) == 4 * len(model.plan.units)


def test_features_on_the_device_are_those_on_the_cpu() -> None:
    model, views = wrapped("resnet18")
    labels = torch.arange(len(views[0])) % 2
    found = []
    for device in ("cuda", "cpu"):
        model.to(device)
        found.append(stage_quality(model, [(views[0], labels.cuda())], [(views[1].cpu(), labels)], linear_probe=False))
    for one, other in zip(*(report.stages for report in found), strict=True):
        assert one.knn == other.knn
        assert one.effective_rank == pytest.approx(other.effective_rank, rel=1e-6)
        assert one.uniformity == pytest.approx(other.uniformity, abs=1e-6)
    model.cuda()
    agreement = gradient_agreement(model, *views)
    assert agreement.stages[-1].whole.cosine == pytest.approx(1)


def test_gradients_on_the_device_of_each_stage() -> None:
    """A backbone on the CPU and the device: its second stage moves what it is given."""

    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(4, 4).cuda()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.cuda())  # type: ignore[no-any-return]

    views = torch.rand(2, 4, 3, 8, 8).unbind()
    model = LocalWrapper(nn.Sequential(conv(3, 4), Moves()), [0, 1], 0, decoder=MLPDecoder, example=views[0])
    assert [next(decoder.parameters()).device.type for decoder in model.decoders] == ["cpu", "cuda"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [None, 64], ids=["kept", "tiles"])
@pytest.mark.parametrize("form", ["nt-xent", "two-way", "one-way"])
def test_infonce_multiplies_half_precision_and_adds_up_in_single(
    form: str, tile: int | None, dtype: torch.dtype
) -> None:
    z0, z1 = torch.randn(2, 200, 64, device="cuda")
    views = [z.to(dtype).requires_grad_() for z in (z0, z0 + z1)]
    exact = [view.detach().double().requires_grad_() for view in views]
    loss, top1 = info_nce(*views, form=form, tile=tile, precision="input", return_top1=True)
    expected = info_nce(*exact, form=form, tile=0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), expected, rtol=2 * eps, atol=0)
    assert (loss.dtype, top1.shape) == (torch.float32, ())
    for found, wanted in zip(torch.autograd.grad(loss, views), torch.autograd.grad(expected, exact), strict=True):
        assert (found.double() - wanted).norm() < 4 * eps * wanted.norm()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # an import of torch's own
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")  # dynamo does, in 2.11
@pytest.mark.parametrize("tile", [None, 64], ids=["kept", "tiles"])
def test_infonce_compiles_with_products_in_half_precision(tile: int | None) -> None:
    torch._dynamo.reset()
    views = [torch.randn(200, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    compiled = torch.compile(lambda *z: info_nce(*z, tile=tile, precision="input"), fullgraph=True)
    loss, expected = compiled(*views), info_nce(*views, tile=tile, precision="input")
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    found, wanted = (torch.cat(torch.autograd.grad(value, views)).float() for value in (loss, expected))
    assert (found - wanted).norm() < 0.03 * wanted.norm()
