"""Compiled blocks and decoders give the gradients of eager ones, or say what to set."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from oracle import assert_same, gradients, oracle
from torch import nn
from torchvision.models.resnet import BasicBlock
from zoo import conv

from locallearn import LocalWrapper, MLPDecoder

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def net() -> nn.Sequential:
    return nn.Sequential(conv(3, 4), *[nn.Sequential(BasicBlock(4, 4)) for _ in range(3)])


def wrap(backbone: nn.Module, overlap: int, **options: object) -> LocalWrapper:
    options = {"decoder": MLPDecoder, "example": torch.rand(2, 3, 8, 8), **options}
    return LocalWrapper(backbone, ["1", "2", "3"], overlap, **options)  # type: ignore[arg-type]


def is_block(module: nn.Module) -> bool:
    return isinstance(module, BasicBlock)


def compile_blocks(backbone: nn.Sequential) -> None:
    for stage in list(backbone)[1:]:
        stage[0].compile(backend="aot_eager")  # type: ignore[index]


@pytest.mark.parametrize("overlap", [0, 1, 2])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_compiled_blocks_and_decoders_have_the_gradients_of_eager_ones(overlap: int, checkpoint: bool) -> None:
    model = wrap(net(), overlap, checkpoint=is_block if checkpoint else False)
    pair = torch.rand(2, 4, 3, 8, 8).unbind()
    twin = copy.deepcopy(model)
    expected = oracle(twin, *pair)[1]
    compile_blocks(model.backbone)  # type: ignore[arg-type]
    for decoder in model.decoders:
        decoder.compile(backend="aot_eager")
    with torch._functorch.config.patch(donated_buffer=False):
        for _ in range(2):  # the second step runs what the first one has compiled
            model.zero_grad()
            model.local_step(*pair)
            assert_same(gradients(model), expected)
    assert model.backbone.get_buffer("1.0.bn1.num_batches_tracked") == 2


def test_donated_buffers_are_refused_with_what_to_set() -> None:
    backbone, pair = net(), torch.rand(2, 4, 3, 8, 8).unbind()
    alone, shared = wrap(backbone, 0), wrap(backbone, 1)
    compile_blocks(backbone)
    with torch._functorch.config.patch(donated_buffer=True):
        alone.local_step(*pair)  # compiles backwards that run once only
        with pytest.raises(RuntimeError, match=r"Set torch._functorch.config.donated_buffer = False before"):
            shared.local_step(*pair)
    assert not any(module._forward_hooks for module in backbone.modules())
