"""What the user hands over is never overwritten, however the backbone begins."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import assert_same, gradients, oracle
from torch import Tensor, nn
from zoo import conv, small_net

from locallearn import LocalWrapper, MLPDecoder, Plan, Unit, memory_report, plan_stages


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(0.5)


class CentredAlias(nn.Module):
    """Through a view without a graph, as preprocessing often does."""

    def forward(self, x: Tensor) -> Tensor:
        x.detach()[:, :1].mul_(2.0)
        return x


class Noisy(nn.Module):
    """Begins in place in training mode only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1.0) if self.training else x


class Whole(nn.Module):
    """Changes the images after the first stage has handed them on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.net = nn.Identity(), small_net()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.net(x.clamp_(0.2, 0.8))  # type: ignore[no-any-return]


def before(module: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Sequential(module, conv(3, 4)), conv(4, 4), conv(4, 4))


BEGINNINGS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "subtraction": (lambda: before(Centred()), ["0", "1", "2"]),
    "relu": (lambda: before(nn.ReLU(inplace=True)), ["0", "1", "2"]),
    "through an alias": (lambda: before(CentredAlias()), ["0", "1", "2"]),
    "behind a cut": (Whole, ["first", "net.0", "net.2"]),
}


def wrap(backbone: nn.Module, stages: list[str] | str, **options: object) -> LocalWrapper:
    return LocalWrapper(backbone, stages, **{"decoder": MLPDecoder, "example": torch.randn(2, 3, 8, 8), **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("beginning", BEGINNINGS)
@pytest.mark.parametrize("entry", ["local_step", "forward", "evaluation"])
def test_views_that_are_neighbours_are_not_overwritten(beginning: str, entry: str) -> None:
    build, stages = BEGINNINGS[beginning]
    model = wrap(build(), stages)
    images = torch.randn(8, 3, 8, 8)
    known = images.clone()
    losses, expected = oracle(model, *known.clone().chunk(2))
    if entry == "evaluation":
        with torch.no_grad():
            model(*images.chunk(2))
    elif entry == "forward":
        model(*images.chunk(2)).backward()
    else:
        model.local_step(*images.chunk(2))
    assert torch.equal(images, known)
    torch.testing.assert_close(model.losses, losses)
    if entry != "evaluation":
        assert_same(gradients(model), expected)


@pytest.mark.parametrize("beginning", BEGINNINGS)
@pytest.mark.parametrize("way", ["named", "recomputed", "gap", "auto", "planned"])
def test_an_example_is_not_overwritten(beginning: str, way: str) -> None:
    build, names = BEGINNINGS[beginning]
    example = torch.randn(2, 3, 8, 8)
    known = example.clone()
    if way == "planned":
        plan_stages(build(), example, 2, decoder=MLPDecoder)
    elif way == "auto":
        wrap(build(), "auto", example=example, plan=Plan.windows(2, 1))
    else:
        plan = Plan(len(names), [Unit(1, len(names) - 1)]) if way == "gap" else None
        wrap(build(), names, example=example, checkpoint=way == "recomputed", plan=plan)
    assert torch.equal(example, known)


def test_a_report_tells_the_copy_and_overwrites_nothing() -> None:
    images = torch.randn(8, 3, 8, 8)
    known = images.clone()
    changes, plain = (wrap(before(module), ["0", "1", "2"]) for module in (Centred(), nn.Identity()))
    report, other = (memory_report(model, *images.chunk(2)) for model in (changes, plain))
    assert torch.equal(images, known)
    assert max(report.predicted) == max(other.predicted) + images.nbytes


def test_ordinary_backbones_get_no_copy() -> None:
    model = wrap(small_net(), ["0", "1", "2"])
    seen: list[int] = []
    model.backbone[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].data_ptr()))  # type: ignore[index]
    images = torch.randn(8, 3, 8, 8)
    model.local_step(*images.chunk(2))
    assert seen == [images.data_ptr()]


@pytest.mark.parametrize("module", [Noisy(), nn.Dropout(0.5, inplace=True)], ids=["noise", "dropout"])
def test_what_begins_in_place_in_training_only_is_told_once_and_then_gets_a_copy(module: nn.Module) -> None:
    model = wrap(before(module), ["0", "1", "2"])
    with pytest.raises(
        RuntimeError, match=r"changed the views of this step in place.*from the next step on it gets a copy"
    ):
        model.local_step(*torch.randn(8, 3, 8, 8).chunk(2))
    for images in torch.randn(2, 8, 3, 8, 8):
        known = images.clone()
        model.zero_grad()
        state = torch.get_rng_state()
        losses, expected = oracle(model, *known.clone().chunk(2))
        torch.set_rng_state(state)
        torch.testing.assert_close(model.local_step(*images.chunk(2)), losses)
        assert torch.equal(images, known)
        assert_same(gradients(model), expected)


def test_views_that_are_copied_anyway_may_be_changed_in_training_only() -> None:
    model = wrap(before(Noisy()), ["0", "1", "2"])
    pair = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    known = [view.clone() for view in pair]
    model.local_step(*pair)
    assert all(map(torch.equal, pair, known))


def test_views_made_in_inference_mode_can_be_trained_on() -> None:
    model = wrap(small_net(), ["0", "1", "2"])
    with torch.inference_mode():
        images = torch.randn(8, 3, 8, 8)
        model(*images.chunk(2))
    expected = oracle(model, *images.clone().chunk(2))[1]
    model.local_step(*images.chunk(2))
    assert_same(gradients(model), expected)
