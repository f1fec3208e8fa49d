"""``stages="auto"`` where several tensors pass a cut, one of which was made from another, and where a pooling follows tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from locallearn import LocalWrapper, memory_report, plan_stages
from locallearn.testing import assert_local_gradients


@pytest.fixture(autouse=True)
def single_precision() -> None:
    torch.set_default_dtype(torch.float32)


class Stream(nn.Module):
    """A block of a RevNet."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, streams: tuple[Tensor, Tensor] | Tensor) -> tuple[Tensor, Tensor]:
        a, b = streams if isinstance(streams, tuple) else streams.chunk(2, 1)
        a = a + self.f(b).tanh()
        return a, b + self.g(a).tanh()


class Normalised(nn.Module):
    """Returns what it has normalised, too, as the projection of wav2vec2."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.map = nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        return self.map(x), x


class Handed(nn.Module):
    """A block that hands on what its first part has returned, as BLOOM's its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.top = Normalised(), nn.Linear(32, 32)

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, kept = self.mix(x if isinstance(x, Tensor) else x[0])
        return self.top(x), kept


@pytest.mark.parametrize("block", [Stream, Handed])
def test_tensors_over_a_cut_that_are_made_one_from_another_are_weighed(block: type[nn.Module]) -> None:
    net = nn.Sequential(*(block() for _ in range(5)))
    width = 64 if block is Stream else 32
    batch = torch.rand(16, width)
    model = LocalWrapper(net, plan_stages(net, batch, 3).stages, example=batch)
    report = memory_report(model, batch, batch)
    assert max(report.predicted) == pytest.approx(max(report.counted), rel=0.1)
    assert_local_gradients(model, *torch.rand(2, 4, width))


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.project = nn.Linear(32, 32), Normalised()
        self.top = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.project(self.a(x))[0])  # type: ignore[no-any-return]


def test_a_tensor_over_a_cut_that_only_the_other_was_made_from() -> None:
    assert plan_stages(Projected(), torch.rand(8, 32), 4).stages[-1].startswith("top")


class Tokens(nn.Module):
    """Blocks of tokens, and a pooling that puts positions last, as Hugging Face's Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(4)))
        self.pooler = nn.AdaptiveAvgPool1d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pooler(self.blocks(x).transpose(1, 2)).flatten(1)  # type: ignore[no-any-return]


def test_a_pooling_over_tokens_is_left_out() -> None:
    assert plan_stages(Tokens(), torch.rand(8, 6, 8), 4).stages == ("blocks.0", "blocks.1", "blocks.2", "blocks")
