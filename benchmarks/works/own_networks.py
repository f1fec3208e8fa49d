"""Networks that are in no library: U-Net, nets over one and three dimensions, recurrent, graph and point nets, experts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from locallearn.models import presnet_small, resnet_cifar, shufflenet_v2_50
from works.families import FAMILIES, Family, Graphs, UNet, images, numbered
from works.kinds import Network, Way, of


class Experts(nn.Module):
    """A mixture of experts: the best of four for each row, weighted."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 4)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(1).max(1)
        output = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            at = (chosen == k).nonzero()[:, 0]
            output = output.index_add(0, at, expert(x[at]).tanh() * weights[at, None])
        return x + output


class Points(nn.Module):
    """PointNet: one network for every point, and the largest values of all."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv1d(a, b, 1), nn.BatchNorm1d(b), nn.ReLU())
            for a, b in [(3, 8), (8, 16), (16, 32), (32, 32)]
        )
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.amax(2))  # type: ignore[no-any-return]


class Neighbours(nn.Module):
    """A graph net over nodes `(graphs, nodes, features)`, each layer with the adjacency."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5 if k == 0 else 8, 8) for k in range(4))

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        for layer in self.layers:
            nodes = layer(adjacency @ nodes).tanh()
        return nodes


class Decoded(nn.Module):
    """A recurrent network: an embedding, LSTMs with dropout between them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.lstms = nn.ModuleList(nn.LSTM(8, 8, batch_first=True) for _ in range(3))
        self.drops = nn.ModuleList(nn.Dropout(0.1) for _ in range(3))
        self.head = nn.Linear(8, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for lstm, drop in zip(self.lstms, self.drops, strict=True):
            x = drop(lstm(x)[0])
        return self.head(x)  # type: ignore[no-any-return]


def convolutions(dims: int) -> nn.Sequential:
    make: Any = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    norm: Any = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[dims]
    widths = [3, 8, 8, 16, 16]
    return nn.Sequential(
        *[
            nn.Sequential(make(a, b, 3, 1 + k % 2, 1), norm(b), nn.ReLU(inplace=True))
            for k, (a, b) in enumerate(pairwise(widths))
        ]
    )


def transformer() -> nn.Sequential:
    layers = [nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True) for _ in range(4)]
    return nn.Sequential(nn.Embedding(40, 16), *layers, nn.Linear(16, 40))


def rows(width: int) -> Callable[[], Tensor]:
    return lambda: torch.rand(4, width)


def mlp() -> nn.Sequential:
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()) for _ in range(4)])


def joined_graph() -> tuple[Tensor, Tensor, Tensor]:
    """Two augmentations of a graph of five nodes: ten nodes, whose edges are numbered."""
    ends = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 0, 6, 7, 8, 9, 5]])
    return torch.rand(10, 8), torch.rand(10, 4), ends


def halves(vectors: Tensor) -> Tensor:
    """A loss for one view that holds two."""
    a, b = vectors.chunk(2)
    return F.mse_loss(a, b) - vectors.std()


def own_networks() -> dict[str, Network]:
    adjacency = (torch.rand(4, 6, 6) < 0.5).float()
    tuples = ["LSTMs", "GRUs", "RevNet", "two streams"]
    return {
        **{name: of("own", FAMILIES[name]) for name in tuples},
        "LSTMs with embedding, dropout and head": Network(
            "own", lambda: (Decoded(), lambda: torch.randint(20, (4, 7)))
        ),
        "U-Net": of(
            "own",
            Family(UNet, ["d2", "d3", "u2", "u1"], images(16)),
            ways=[
                Way("its encoder alone", UNet, ["d1", "d2", "d3"]),
                Way("skips inside of one stage", UNet, ["d1", "u1"]),
            ],
        ),
        "U-Net's encoder": of("own", Family(UNet, ["d1", "d2", "d3"], images(16))),
        "1-D convolutions": Network("own", lambda: (convolutions(1), lambda: torch.rand(4, 3, 33))),
        "3-D convolutions": Network("own", lambda: (convolutions(3), lambda: torch.rand(4, 3, 9, 9, 9))),
        "multi-layer perceptron": Network("own", lambda: (mlp(), rows(8))),
        "transformer of torch.nn": Network("own", lambda: (transformer(), lambda: torch.randint(40, (4, 9)))),
        "graph net, dense adjacency": Network("own", lambda: (Neighbours(), lambda: (torch.rand(4, 6, 5), adjacency))),
        "graph net with edge features": of(
            "own", Family(Graphs, numbered("layers"), joined_graph), options={"loss": halves}, views=1
        ),
        "PointNet": Network("own", lambda: (Points(), lambda: torch.rand(4, 3, 20))),
        "mixture of experts": Network("own", lambda: (nn.Sequential(*[Experts() for _ in range(4)]), rows(8))),
        "locallearn.models.presnet_small": Network("own", lambda: (presnet_small(), images(32))),
        "locallearn.models.resnet_cifar": Network("own", lambda: (resnet_cifar(20), images(32))),
        "locallearn.models.shufflenet_v2_50": Network("own", lambda: (shufflenet_v2_50(), images(64))),
    }
