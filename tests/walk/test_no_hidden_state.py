"""Two wrappers at once or in turn, nested passes, threads."""

from __future__ import annotations

import threading

import pytest
import torch
from oracle import assert_same, gradients, oracle
from torch import Tensor, nn
from zoo import small_net

from locallearn import InfoNCE, LocalWrapper, MLPDecoder


def views() -> tuple[Tensor, ...]:
    return torch.rand(2, 4, 3, 8, 8).unbind()


def wrap(backbone: nn.Module, overlap: int = 1, **options: object) -> LocalWrapper:
    options = {"decoder": MLPDecoder, "example": torch.rand(2, 3, 8, 8), **options}
    return LocalWrapper(backbone, [0, 1, 2], overlap, **options)  # type: ignore[arg-type]


def assert_right(model: LocalWrapper) -> None:
    pair = views()
    model.zero_grad()
    expected = oracle(model, *pair)[1]
    model.local_step(*pair)
    assert_same(gradients(model), expected)


def test_two_wrappers_of_two_backbones_take_turns() -> None:
    first, second = wrap(small_net(), 0), wrap(small_net(), 2)
    for model in (first, second, first):
        assert_right(model)


def test_two_wrappers_of_one_backbone_take_turns() -> None:
    backbone = small_net()
    first, second = wrap(backbone, 0), wrap(backbone, 1)
    for model in (first, second, first):
        assert_right(model)


class RunsAnother(nn.Module):
    """A loss that trains another wrapper, and runs a backbone, before it returns."""

    def __init__(self, other: LocalWrapper, backbone: nn.Module, pair: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.others = [other, backbone]  # in a list, so that they are not registered
        self.pair = pair
        self.outputs: list[Tensor] = []

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        other, backbone = self.others
        other.local_step(*self.pair)  # type: ignore[operator]
        with torch.no_grad():
            self.outputs.append(backbone(self.pair[0]))
        return InfoNCE()(a, b)


@pytest.mark.parametrize("same_backbone", [False, True])
def test_a_loss_may_train_another_wrapper(same_backbone: bool) -> None:
    backbone, pair, inner_pair = small_net(), views(), views()
    inner = wrap(backbone if same_backbone else small_net(), 0)
    plain = wrap(backbone)
    loss = RunsAnother(inner, backbone, inner_pair)
    outer = wrap(backbone, decoder=list(plain.decoders), loss=loss)
    expected_inner, expected_outer = oracle(inner, *inner_pair)[1], oracle(plain, *pair)[1]
    outer.local_step(*pair)
    torch.testing.assert_close(loss.outputs[0], backbone(inner_pair[0]))
    assert_same(gradients(outer.decoders), gradients_of(expected_outer, "decoders."))
    for name, gradient in gradients_of(expected_inner, "backbone.").items():  # one inner step per unit of the outer one
        expected = 2 * gradient + (expected_outer["backbone." + name] if same_backbone else 0)
        torch.testing.assert_close(inner.backbone.get_parameter(name).grad, expected)


def gradients_of(all_of_them: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): g for name, g in all_of_them.items() if name.startswith(prefix)}


def test_threads_each_with_their_own_wrapper() -> None:
    models = [wrap(small_net(), overlap) for overlap in (0, 1, 2, 1)]
    pairs = [views() for _ in models]
    expected = [oracle(model, *pair)[1] for model, pair in zip(models, pairs, strict=True)]
    start = threading.Barrier(len(models))
    failures: list[Exception] = []

    def work(model: LocalWrapper, pair: tuple[Tensor, ...]) -> None:
        try:
            start.wait()
            for _ in range(20):
                model.local_step(*pair)
        except Exception as error:  # noqa: BLE001 - whatever it is, the main thread shows it
            failures.append(error)

    threads = [threading.Thread(target=work, args=both) for both in zip(models, pairs, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for model, gradient in zip(models, expected, strict=True):
        assert_same(gradients(model), {name: 20 * g for name, g in gradient.items()}, tolerance=1e-9)


def test_another_thread_finds_the_backbone_plain_during_a_pass() -> None:
    backbone, images, outputs = small_net(), torch.rand(2, 3, 8, 8), []

    class Peeks(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            thread = threading.Thread(target=lambda: outputs.append(backbone(images)))
            thread.start()
            thread.join()
            return InfoNCE()(a, b)

    wrap(backbone, loss=Peeks()).local_step(*views())
    for output in outputs:
        assert output.requires_grad
        torch.testing.assert_close(output, backbone(images))
