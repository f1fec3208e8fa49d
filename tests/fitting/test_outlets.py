"""Probing finds the outlets and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, small_net

from locallearn import LocalWrapper, MLPDecoder
from locallearn._fitting.batches import example_batch
from locallearn._fitting.channels import channel_axis
from locallearn._fitting.outlets import probe


@pytest.mark.parametrize("name", ZOO)
def test_outlets_have_the_shapes_of_a_plain_forward(name: str) -> None:
    specimen = ZOO[name]
    backbone = specimen.build().eval()
    batch = specimen.views(2)[0]
    seen: list[tuple[int, ...]] = []
    for cut in specimen.stages:
        backbone.get_submodule(cut).register_forward_hook(lambda module, args, output: seen.append(output.shape))
    backbone(batch)
    expected = list(seen)
    assert [outlet.features.shape for outlet in probe(backbone, tuple(specimen.stages), batch)] == expected


def test_a_stage_of_one_module_is_found() -> None:
    specimen = ZOO["resnet18"]
    backbone = specimen.build()
    outlets = probe(backbone, ("layer1", "layer2", "layer4"), specimen.views(2)[0])
    assert [outlet.module for outlet in outlets] == [None, backbone.layer2, None]


class Counting(nn.Module):
    """Changes its buffer in eval mode too, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = x.detach().mean((0, 2, 3))
        return x + torch.rand(())


def test_probing_leaves_buffers_random_state_modes_and_hooks() -> None:
    backbone = nn.Sequential(small_net(), Counting(), nn.BatchNorm2d(4), small_head())
    backbone[2].eval()
    decoder = nn.Sequential(nn.BatchNorm2d(4), Counting(), MLPDecoder(4))
    decoder[0].eval()
    modules = [*backbone.modules(), *decoder.modules()]
    modes = [module.training for module in modules]
    before = {
        name: value.clone() for m in (backbone, decoder) for name, value in m.state_dict(prefix=str(id(m))).items()
    }
    state = torch.get_rng_state()
    LocalWrapper(backbone, [1, 3], 1, [decoder], example=torch.rand(2, 3, 8, 8, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in modules] == modes
    after = {name: value for m in (backbone, decoder) for name, value in m.state_dict(prefix=str(id(m))).items()}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def small_head() -> nn.Module:
    return nn.Conv2d(4, 4, 1)


def test_default_example_is_two_images_in_the_backbones_dtype_and_device() -> None:
    batch = example_batch(nn.Linear(2, 2).to(torch.bfloat16), None)
    assert (batch.shape, batch.dtype) == ((2, 3, 224, 224), torch.bfloat16)
    assert example_batch(nn.Linear(2, 2, device="meta"), None).device.type == "meta"


def test_views_as_an_example_are_one_batch() -> None:
    assert example_batch(nn.Linear(2, 2), [torch.zeros(1, 5), torch.zeros(1, 5)]).shape == (2, 5)


def test_a_backbone_that_does_not_run_on_it_asks_for_an_example() -> None:
    with pytest.raises(ValueError, match=r"Sequential does not run on .*\(2, 3, 224, 224\).*example=batch"):
        LocalWrapper(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), [0, 1])


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((2, 5), 1), ((2, 9, 5), -1), ((2, 8, 7, 7), 1), ((2, 7, 7, 8), -1), ((2, 8, 8, 8), 1), ((2, 3, 4, 5, 6), 1)],
)
def test_channel_axis(shape: tuple[int, ...], axis: int) -> None:
    assert channel_axis(shape) == axis


def test_channels_last_maps_reach_the_decoder_channels_first() -> None:
    specimen = ZOO["swin"]
    model = LocalWrapper(specimen.build(), specimen.stages, decoder=specimen.decoder, example=specimen.views(2)[0])
    assert [decoder[1].channels for decoder in model.decoders] == [24, 48]  # type: ignore[index]
    assert model.decoders[0][0](torch.zeros(2, 4, 4, 24)).shape == (2, 24, 4, 4)  # type: ignore[index, operator]


def test_the_user_may_say_where_the_channels_are() -> None:
    audio = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Conv1d(4, 6, 3))
    model = LocalWrapper(audio, [0, 1], decoder=MLPDecoder, example=torch.rand(2, 1, 16), channel_axis=1)
    assert model.decoders[0].channels == 6
    with pytest.raises(ValueError, match="channel_axis is 1, -1 or None; got 2"):
        LocalWrapper(audio, [0, 1], decoder=MLPDecoder, example=torch.rand(2, 1, 16), channel_axis=2)


class Moves(nn.Module):
    """Changes what is registered whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.average = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.average.data.mul_(0.9)
        with torch.no_grad():
            self.conv.weight.mul_(0.5)
        return self.conv(x) * self.average


@pytest.mark.parametrize("checkpoint", [False, True])
def test_wrapping_changes_no_weights(checkpoint: bool) -> None:
    net = nn.Sequential(Moves(), nn.Conv2d(4, 4, 3))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    LocalWrapper(net, [0, 1], decoder=MLPDecoder, example=torch.rand(2, 3, 8, 8), checkpoint=checkpoint)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_sparse_buffers_are_no_obstacle() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    net.register_buffer("adjacency", torch.eye(3).to_sparse())
    net[0].register_buffer("adjacency", torch.eye(3).to_sparse_csr())
    for checkpoint in (False, nn.Conv2d):
        model = LocalWrapper(net, [0, 1], decoder=MLPDecoder, example=torch.rand(2, 3, 8, 8), checkpoint=checkpoint)
        model.local_step(*torch.rand(2, 2, 3, 8, 8))
