"""What a training step of a method costs: FLOPs, peak and saved bytes, counted on fake tensors; and what the plan predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TypeAlias

import torch
from backbones import ARCHITECTURES, Architecture
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torchvision.models import vit_b_16

from locallearn import ConvMLPDecoder, InfoNCE, LocalWrapper, MLPDecoder, Plan, TokenDecoder
from locallearn._fitting.recomputed import runs
from locallearn._walk.recompute import Run, recomputed
from locallearn._walk.replay import Learnt
from locallearn.memory import Cost, measure

VIT = Architecture(
    lambda size: vit_b_16(image_size=size), tuple(f"encoder.layers.encoder_layer_{k}" for k in (2, 5, 8, 11))
)
COUNTED = {**ARCHITECTURES, "vit_b_16": VIT}  # four equal stages of three transformer blocks, to compare with
# LoCo's largest unit on PResNet-50, stages 2 and 3, leaves its decoder 27 MB of 1,672 if it is to save 2.68x
DECODER_WIDTHS = {"presnet50": 128, "presnet50-literal": 128}

Storages: TypeAlias = dict[int, UntypedStorage]  # by id
Checkpoint: TypeAlias = bool | tuple[bool, type[nn.Module]]  # as LocalWrapper takes it
BLOCKS_AND_STAGES: Checkpoint = (True, nn.Sequential)


@dataclass(frozen=True)
class Method:
    """A way to train: locally with an overlap, or plainly end to end where it is None."""

    name: str = field(compare=False)
    overlap: int | None
    block: bool = True  # in the decoder, before its MLP
    checkpoint: Checkpoint = False
    full_width: bool = False  # the decoder as wide as the outlet, whatever the setting says


@dataclass(frozen=True)
class Setting:
    """What all methods share. `decoder_width` is the most channels that the decoder's block puts out; None: the outlet's."""

    arch: str
    batch_size: int = 32  # images, of two views each
    image_size: int = 224
    decoder_width: int | None = None

    def images(self) -> Tensor:
        return torch.zeros(2 * self.batch_size, 3, self.image_size, self.image_size)

    @property
    def stages(self) -> tuple[str, ...]:
        return COUNTED[self.arch].stages

    def backbone(self) -> nn.Module:
        """A copy, of fake tensors under a FakeCopyMode: some initialisations cannot be faked."""
        return deepcopy(_backbone(self.arch, self.image_size))

    def decoder(self, method: Method) -> Callable[[int], nn.Module]:
        if self.arch == "vit_b_16":
            return TokenDecoder if method.block else partial(TokenDecoder, blocks=0)
        if not method.block:
            return MLPDecoder
        return ConvMLPDecoder if method.full_width else partial(narrow_decoder, width=self.decoder_width)


@cache
def _backbone(arch: str, image_size: int) -> nn.Module:
    return COUNTED[arch].make(image_size)


def narrow_decoder(channels: int, width: int | None) -> nn.Module:
    """The paper's decoder with a block of at most `width` channels; the MLP's hidden layer stays as wide as the outlet."""
    return ConvMLPDecoder(channels, widths=min(channels, width or channels), hidden=min(channels, 2048))


def methods(setting: Setting) -> list[Method]:
    """The rows of the table: end to end, every overlap, and both with recomputation."""
    n = len(setting.stages)
    whole = setting.stages[0].startswith("layer")  # each stage is one nn.Sequential
    local = [
        Method("LoCo (`overlap=1`)", 1),
        Method("Greedy InfoMax (`overlap=0`)", 0),
        *(Method(f"`overlap={overlap}`", overlap) for overlap in range(2, n - 1)),
    ]
    wide = [
        Method("LoCo, decoder as wide as the outlet", 1, full_width=True),
        Method("Greedy InfoMax, decoder as wide as the outlet", 0, full_width=True),
    ]
    return [
        Method("end-to-end, MLP decoder (SimCLR)", None, block=False),
        Method("end-to-end, block + MLP decoder", None),
        *local,
        *(wide if setting.decoder_width else []),
        Method("end-to-end, blocks recomputed", None, checkpoint=True),
        *(replace(method, name=f"{short(method)}, blocks recomputed", checkpoint=True) for method in local),
        *([Method("LoCo, blocks and stages recomputed", 1, checkpoint=BLOCKS_AND_STAGES)] if whole else []),
    ]


def short(method: Method) -> str:
    return method.name.split(" (")[0]


# ------------------------------------------------------------------------------------------------------- counted


def end_to_end_step(
    backbone: nn.Module, top: str, decoder: nn.Module, images: Tensor, chosen: Mapping[Run, Learnt]
) -> None:
    """A step of plain training, in which nothing of the wrapper takes part; `chosen` is recomputed."""
    outlets: list[Tensor] = []
    handle = backbone.get_submodule(top).register_forward_hook(lambda module, args, output: outlets.append(output))
    with recomputed(backbone, chosen, lambda: True):
        backbone(images)
    handle.remove()
    InfoNCE()(*decoder(outlets.pop()).chunk(2)).backward()


def new_step(setting: Setting, method: Method, backbone: nn.Module) -> Callable[[], None]:
    """A step on the device of `backbone`, when the gradients of the weights are already there."""
    overlap = len(setting.stages) - 1 if method.overlap is None else method.overlap
    images = setting.images().to(next(backbone.parameters()).device)
    model = LocalWrapper(
        backbone, setting.stages, overlap, setting.decoder(method), checkpoint=method.checkpoint, example=images[:2]
    )
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    if method.overlap is None:
        chosen = runs(backbone, setting.stages, method.checkpoint, images[:2])
        return partial(end_to_end_step, backbone, setting.stages[-1], model.decoders[0], images, chosen)
    return partial(model.local_step, *images.chunk(2))


@cache
def counted(setting: Setting, method: Method) -> Cost:
    """Exact, the same on every machine; without what all methods share: weights, their gradients, images."""
    fake = FakeTensorMode()
    with FakeCopyMode(fake):
        backbone = setting.backbone()
    with fake:
        return measure(new_step(setting, method, backbone))


def on_cuda(setting: Setting, method: Method) -> int:
    """The most bytes that a step adds on the GPU: what the count leaves out are libraries' workspaces and rounding."""
    step = new_step(setting, method, setting.backbone().to("cuda"))
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# ------------------------------------------------------------------------------------------------------- predicted


@dataclass(frozen=True)
class Parts:
    """What is saved for backward in each stage and, above it, in a decoder; what several save stands in each."""

    outlets: list[Tensor]
    stages: list[Storages]
    decoders: list[Storages]

    def unit(self, first: int, last: int) -> int:
        """The bytes that a unit of these stages holds when its loss is there."""
        return size([*self.stages[first : last + 1], self.decoders[last]])


def size(parts: Iterable[Storages]) -> int:
    """Bytes; what several parts share counts once."""
    union: Storages = {}
    for part in parts:
        union |= part
    return sum(storage.nbytes() for storage in union.values())


class Saved:
    """A hook for what autograd saves: notes it in `part`, which changes as the network runs. Weights do not count."""

    def __init__(self) -> None:
        self.part: Storages = {}
        self._known: Storages = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in self._known:
            self.part[id(storage)] = storage
        return tensor

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        self._known |= {id(storage): storage for tensor in tensors if (storage := tensor.untyped_storage())}

    def ignore_weights(self, module: nn.Module) -> None:
        self.ignore([*module.parameters(), *module.buffers()])


def parts(setting: Setting, method: Method) -> Parts:
    """Runs the backbone, and a decoder on every outlet, and notes what autograd saves."""
    found = Parts([], [{} for _ in setting.stages], [{} for _ in setting.stages])
    saved = Saved()
    fake = FakeTensorMode()
    with FakeCopyMode(fake):
        backbone = setting.backbone()

    def end_stage(module: nn.Module, args: object, outlet: Tensor) -> None:
        found.outlets.append(outlet)
        ended = len(found.outlets)
        saved.part = found.stages[ended] if ended < len(setting.stages) else {}  # what follows is not trained

    with fake:
        images = setting.images()
        chosen = runs(backbone, setting.stages, method.checkpoint, images[:2])
    for stage in setting.stages:
        backbone.get_submodule(stage).register_forward_hook(end_stage)
    with fake, torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        saved.ignore([images])
        saved.ignore_weights(backbone)
        saved.part = found.stages[0]
        with recomputed(backbone, chosen, lambda: True):
            backbone(images)
        for outlet, saved.part in zip(found.outlets, found.decoders, strict=True):
            decoder = new_decoder(setting, method, outlet)
            saved.ignore_weights(decoder)
            decoder(outlet.detach().requires_grad_())
    return found


def new_decoder(setting: Setting, method: Method, outlet: Tensor) -> nn.Module:
    return setting.decoder(method)(outlet.shape[-1 if outlet.ndim == 3 else 1])


def decoder_costs(setting: Setting, method: Method, outlets: Sequence[Tensor]) -> list[Cost]:
    """A forward and a backward of a decoder on each outlet."""

    def cost(outlet: Tensor) -> Cost:
        decoder, inlet = new_decoder(setting, method, outlet), outlet.detach().requires_grad_()
        return measure(lambda: decoder(inlet).sum().backward())

    with outlets[0].fake_mode:  # type: ignore[attr-defined]
        return [cost(outlet) for outlet in outlets]


def predicted(setting: Setting, method: Method, of: Parts) -> int:
    """The most bytes saved at once: those of the largest unit, and of its decoder."""
    n = len(setting.stages)
    plan = Plan.windows(n, n - 1 if method.overlap is None else method.overlap)
    return max(of.unit(unit.first, unit.last) for unit in plan.units)
