"""``stages="auto"`` and its report on what people have: any dtype, device and input, any head, quickly, and without a trace."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from time import process_time
from typing import Any, ClassVar

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision import models
from zoo import conv

from locallearn import LocalWrapper, Plan, memory_report, plan_stages, stages_of
from locallearn.testing import assert_local_gradients


def planned(net: nn.Module, batch: Tensor, n: int = 2) -> LocalWrapper:
    """Plans, wraps, and holds the prediction of the report to what it counts."""
    model = LocalWrapper(net, plan_stages(net, batch, n).stages, example=batch)
    report = memory_report(model, batch, batch)
    assert max(report.predicted) == pytest.approx(max(report.counted), rel=0.1)
    return model


def small(dtype: torch.dtype | None = None) -> nn.Sequential:
    return nn.Sequential(*(part for k in range(4) for part in (conv(8 if k else 3, 8), nn.ReLU()))).to(dtype)


# ---------------------------------------------------------------- dtypes, devices, inputs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_dtype(dtype: torch.dtype) -> None:
    model = planned(small(dtype), torch.rand(4, 3, 32, 32, dtype=dtype))
    assert {weight.dtype for weight in model.parameters()} == {dtype}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_backbone_without_numbers(inside: bool, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    with FakeTensorMode() as mode:
        net, images = models.resnet18(), torch.zeros(4, 3, 32, 32)
    torch.set_default_dtype(torch.float32)
    if inside:
        with mode:
            planned(net, images)
    else:
        planned(net, images)


def test_a_backbone_on_meta() -> None:
    model = planned(small().to("meta"), torch.rand(4, 3, 32, 32, device="meta"))
    assert all(weight.is_meta for weight in model.parameters())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_backbone_on_cuda() -> None:
    model = planned(small().cuda(), torch.rand(4, 3, 32, 32, device="cuda", dtype=torch.float32))
    assert all(weight.is_cuda for weight in model.parameters())


class Bytes(nn.Module):
    """Takes images as they are read from a file."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images / 255)  # type: ignore[no-any-return]


def test_images_of_bytes() -> None:
    torch.set_default_dtype(torch.float32)
    planned(Bytes(), torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8))


@pytest.mark.parametrize("sparse", [False, True])
def test_tokens_of_integers(sparse: bool) -> None:
    torch.set_default_dtype(torch.float32)
    blocks = [nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True) for _ in range(3)]
    model = planned(nn.Sequential(nn.Embedding(50, 16, sparse=sparse), *blocks), torch.randint(50, (4, 12)))
    model.local_step(*torch.randint(50, (2, 4, 12)).unbind())
    assert model.backbone[0].weight.grad.is_sparse == sparse  # type: ignore[index, union-attr]


# ---------------------------------------------------------------- what lies behind the last cut


class AdjacencyInside(nn.Module):
    """A graph network whose input holds the adjacency beside the features."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(before, 8) for before in (5, 8, 8, 8)])

    def forward(self, graph: Tensor) -> Tensor:
        adjacency, nodes = graph.split([graph.shape[1], graph.shape[2] - graph.shape[1]], 2)
        for layer in self.layers:
            nodes = layer(adjacency @ nodes).relu()
        return nodes


@dataclass
class Output:
    logits: Tensor


class ReturnsAnObject(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, images: Tensor) -> Output:
        return Output(self.net(images))


class Levels(nn.Module):
    """Returns the outlet of every block, as for a detector."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([conv(8 if k else 3, 8) for k in range(4)])

    def forward(self, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        for block in self.blocks:
            found.append(block(found[-1] if found else x))
        return found


class Recurrent(nn.Module):
    """The dropout behind each LSTM hands on in eval mode what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.lstms = nn.ModuleList([nn.LSTM(before, 8, batch_first=True) for before in (5, 8, 8)])
        self.drops = nn.ModuleList([nn.Dropout(0.1) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for lstm, drop in zip(self.lstms, self.drops, strict=True):
            x = drop(lstm(x)[0])
        return x


class InPlaceHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.classifier = small(), nn.Sequential(nn.Dropout(0.2, inplace=True), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x).mean((2, 3)))  # type: ignore[no-any-return]


class Routed(nn.Module):
    """Every input goes to the expert that its own numbers choose, which no tensor without numbers can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.route = nn.Linear(6, 8), nn.Linear(8, 2)
        self.experts, self.top = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)]), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        weights = self.route(tokens).softmax(-1)
        mixed = torch.zeros_like(tokens)
        for k, expert in enumerate(self.experts):
            chosen = (weights.argmax(-1) == k).nonzero()[:, 0]
            mixed = mixed.index_add(0, chosen, expert(tokens[chosen]) * weights[chosen, k : k + 1])
        return self.top(mixed)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("build", "shape", "stages"),
    [
        (AdjacencyInside, (4, 6, 11), [f"layers.{k}" for k in range(4)]),
        (ReturnsAnObject, (4, 3, 8, 8), ["net.1", "net.3", "net.5", "net"]),
        (Levels, (4, 3, 8, 8), [f"blocks.{k}" for k in range(4)]),
        (Recurrent, (4, 7, 5), [f"drops.{k}" for k in range(3)]),
        (InPlaceHead, (4, 3, 8, 8), ["body.1", "body.3", "body.5", "body"]),
        (Routed, (8, 6), ["embed", "top"]),
    ],
)
def test_cuts_are_found_and_exact(build: Callable[[], nn.Module], shape: tuple[int, ...], stages: list[str]) -> None:
    net, pair = build(), torch.rand(2, *shape).unbind()
    model = LocalWrapper(net, "auto", plan=Plan.windows(len(stages), 1), example=pair[0])
    assert model.stages == tuple(stages)
    assert_local_gradients(model.eval(), *pair)  # without dropout
    if build is Routed:
        with pytest.raises(
            RuntimeError, match=r"copy of Routed does not run without numbers .*count that: locallearn.memory"
        ):
            memory_report(model, *pair)


def test_what_is_cut_may_be_small_parts_of_a_features_only_network() -> None:
    net = timm.create_model("resnet18", features_only=True)
    assert plan_stages(net, torch.rand(2, 3, 64, 64)).left_out == ()


# ---------------------------------------------------------------- what is said


@pytest.mark.parametrize("stages", ["auto", ["layer1", "layer2"]])
def test_an_example_that_the_backbone_does_not_take_is_told_alike(stages: Any) -> None:
    with pytest.raises(
        ValueError, match=r"ResNet does not run on a batch of shape \(2, 1, 8, 8\).*give that: LocalWrapper"
    ):
        LocalWrapper(models.resnet18(), stages, example=torch.rand(2, 1, 8, 8))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d1, self.d2, self.d3 = conv(3, 4), conv(4, 4, 2), conv(4, 4, 2)
        self.u2, self.u1, self.up = conv(8, 4), conv(8, 4), nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.d1(x)
        b = self.d2(a)
        b = self.u2(torch.cat([self.up(self.d3(b)), b], 1))
        return self.u1(torch.cat([self.up(b), a], 1))  # type: ignore[no-any-return]


def test_a_u_net_is_told_that_its_encoder_would_do() -> None:
    net, images = UNet(), torch.rand(2, 3, 8, 8)
    with pytest.raises(
        ValueError, match=r"only be cut after \['d1', 'u1'\]. Up to 'd3' more would do, .*needed until the end"
    ):
        plan_stages(net, images, 3)
    encoder = nn.Sequential(net.d1, net.d2, net.d3)
    assert plan_stages(encoder, images, 3).stages == ("0", "1", "2")


def test_a_decoder_that_fits_nowhere_is_told_with_the_shape() -> None:
    with pytest.raises(
        ValueError, match=r"fits too few outlets .*of shape \(2, 8, 16, 16\): .*chosen by the outlets' shapes"
    ):
        plan_stages(small(), torch.rand(2, 3, 16, 16), 2, decoder=lambda width: nn.Linear(width + 1, 2))


# ---------------------------------------------------------------- without a trace, and quickly


@pytest.mark.parametrize("name", ["efficientvit_m0", "levit_128s"])
def test_what_a_module_keeps_for_evaluation_goes_with_the_mode(name: str) -> None:
    torch.set_default_dtype(torch.float32)
    net, images = timm.create_model(name), torch.rand(2, 3, 224, 224)
    model = LocalWrapper(net, "auto", example=images)
    deepcopy(net)
    model.eval()
    with torch.no_grad():
        net(images)  # keeps what it has computed
    plan_stages(net, images)
    model.train()
    deepcopy(net)


class HearsItsModes(nn.Conv2d):
    heard: ClassVar[list[bool]] = []

    def train(self, mode: bool = True) -> HearsItsModes:
        self.heard.append(mode)
        return super().train(mode)


def test_modes_are_put_back_by_train() -> None:
    net = nn.Sequential(HearsItsModes(3, 4, 3), nn.BatchNorm2d(4), conv(4, 4))
    net[1].eval()
    stages_of(net, 2, torch.rand(2, 3, 8, 8))
    assert HearsItsModes.heard == [False, True]
    assert [module.training for module in net] == [True, False, True]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "regnet_y_400mf", "inception_v3"])
def test_it_takes_seconds(name: str) -> None:
    """Counted in processor time: the largest networks, of which CI has no time, are in the table of what works."""
    torch.set_default_dtype(torch.float32)
    net = models.get_model(name, **({"init_weights": False} if name == "inception_v3" else {}))
    begin = process_time()
    LocalWrapper(net, "auto")
    assert process_time() - begin < 20


# ---------------------------------------------------------------- several tensors, and batches that are not one tensor


class Streams(nn.Module):
    """Blocks that hand on a pair, and read a mask that is an argument of its own."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, pair: tuple[Tensor, Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
            left, right = pair
            return left + self.a(right).tanh() * mask, right + self.b(left).tanh()

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Block() for _ in range(4)])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        pair = (x, x.flip(1))
        for block in self.blocks:
            pair = block(pair, mask)
        return pair[0] + pair[1]


@pytest.mark.parametrize("read", [None, 1])
def test_blocks_that_return_pairs_for_a_batch_of_two_tensors(read: int | None) -> None:
    view = {"x": torch.rand(4, 5, 6), "mask": torch.ones(4, 5, 1)}
    other = {"x": torch.rand(4, 5, 6), "mask": torch.ones(4, 5, 1)}
    net = Streams()
    names = tuple(f"blocks.{k}" for k in range(4))
    assert stages_of(net, 4, view) == names
    plan = plan_stages(net, view, 4, features=read)
    assert plan.stages == names
    outlets = [piece.outlet for stage in plan.pieces for piece in stage]
    assert outlets == [2 * 4 * 5 * 6 * 8] * 4
    model = LocalWrapper(net, plan.stages, example=view, features=read)
    assert_local_gradients(model, view, other)
    report = memory_report(model, view, other)
    assert max(report.predicted) == pytest.approx(max(report.counted), rel=0.1)


def test_a_graph_with_its_edges_is_counted_as_it_is() -> None:
    class Convolve(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
            for layer in self.layers:
                nodes = layer(nodes.index_add(0, edges[1], nodes[edges[0]])).relu()
            return nodes

    graph = (torch.rand(6, 5), torch.randint(6, (2, 9)))
    assert plan_stages(Convolve(), graph, 3).stages == ("layers.0", "layers.1", "layers.2")
    assert stages_of(Convolve(), 3, graph) == ("layers.0", "layers.1", "layers.2")


def test_tiny_images() -> None:
    assert LocalWrapper(models.resnet18(), "auto", example=torch.rand(4, 3, 2, 2)).stages[-1] != "fc"
    with pytest.raises(
        ValueError, match=r"cut after \['relu'\]: what follows sees maps of a single position.*larger inputs"
    ):
        LocalWrapper(models.resnet18(), "auto", example=torch.rand(4, 3, 4, 4))
