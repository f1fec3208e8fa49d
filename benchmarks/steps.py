"""The rows of the step's benchmark: ways to train, each as a callable step of a network, counted or timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple, TypeAlias

import rivals
import torch
from networks import NETWORKS, Network
from rivals import Net
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from locallearn import LocalWrapper
from locallearn.memory import measure

Step: TypeAlias = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A way to train. `overlap` is None for end to end; without a `rival` it is ours.

    `offload`: what is kept for backward lies in the host's memory.
    `parts`: of gradient caching, which splits the batch into as many; they keep their size when the batch grows.
    """

    name: str
    overlap: int | None
    rival: Callable[..., None] | None = None
    checkpoint: bool = False
    parts: int = 1
    offload: bool = False


ROWS = {
    "end-to-end": Row("end-to-end", None, rivals.end_to_end),
    "blocks": Row("end-to-end, blocks recomputed", None, rivals.blocks_recomputed),
    "stages": Row("end-to-end, stages recomputed", None, rivals.stages_recomputed),
    "offload": Row("end-to-end, `save_on_cpu`", None, rivals.offloaded, offload=True),
    "caching-4": Row("gradient caching, 4 parts", None, rivals.gradient_caching, parts=4),
    "caching-8": Row("gradient caching, 8 parts", None, rivals.gradient_caching, parts=8),
    "gim": Row("Greedy InfoMax (`overlap=0`)", 0),
    "gim-checkpoint": Row("Greedy InfoMax, `checkpoint=True`", 0, checkpoint=True),
    "naive": Row("LoCo, a forward per window", 1, rivals.forward_per_window),
    "paper": Row("LoCo, doubled backward (the paper)", 1, rivals.doubled_backward),
    "loco": Row("**LoCo** (`overlap=1`)", 1),
    "loco-checkpoint": Row("**LoCo**, `checkpoint=True`", 1, checkpoint=True),
    "loco-offload": Row("**LoCo**, `save_on_cpu`", 1, offload=True),
    "overlap-2": Row("`overlap=2`", 2),
}
BASE = "end-to-end"


class Counts(NamedTuple):
    """Exact, the same on every machine. `fixed_bytes`: the weights and their gradients, which `peak_bytes` leaves out."""

    flops: int
    peak_bytes: int
    saved_bytes: int
    fixed_bytes: int


@dataclass(frozen=True)
class Setting:
    """What the rows of one table share: `batch_size` images, of two views each."""

    arch: str
    batch_size: int
    image_size: int
    dtype: torch.dtype = torch.float32

    @property
    def network(self) -> Network:
        return NETWORKS[self.arch]

    def images(self, device: str = "cpu") -> Tensor:
        return torch.rand(2 * self.batch_size, 3, self.image_size, self.image_size, device=device)


class Steps:
    """Steps of rows on one backbone. Rows with the same plan have the same decoders."""

    def __init__(self, setting: Setting, backbone: nn.Module, images: Tensor) -> None:
        self._setting, self._backbone, self._images = setting, backbone, images
        self._decoders: dict[int, list[nn.Module]] = {}
        device = images.device.type
        self._precision = partial(torch.autocast, device, setting.dtype, enabled=setting.dtype != torch.float32)

    def model(self, row: Row) -> LocalWrapper:
        """Whose plan and decoders the row has, with gradients already there."""
        network = self._setting.network
        overlap = len(network.stages) - 1 if row.overlap is None else row.overlap
        known = self._decoders.get(overlap)
        model = LocalWrapper(
            self._backbone,
            network.stages,
            overlap,
            known or network.decoder,
            checkpoint=row.checkpoint,
            example=self._images[:2],
        )
        if known is None:
            self._decoders[overlap] = list(model.decoders)
            for weight in model.parameters():
                weight.grad = torch.zeros_like(weight)
        return model

    def step(self, row: Row, part_size: int | None = None) -> Step:
        """`part_size`: of gradient caching's parts, in views; without it, by their number."""
        model = self.model(row)
        if row.rival is None:
            return partial(self._local_step, model, rivals.to_host if row.offload else nullcontext)
        net = Net(self._setting.network.blocks(self._backbone), model.decoders, model.plan, self._precision)
        if row.parts == 1:
            return partial(row.rival, net, self._images)
        return partial(row.rival, net, self._images, size=part_size or len(self._images) // row.parts)

    def compile(self) -> None:
        """Compile each block and decoder by itself, for all rows that there are; a block at which a stage ends cannot be."""
        torch._functorch.config.donated_buffer = False  # what a shared stage keeps is read twice
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = (
            1024  # blocks of one class
        )
        network, backbone = self._setting.network, self._backbone
        cuts = [backbone.get_submodule(name) for name in network.stages]
        own = set(backbone.modules())
        for stage in network.blocks(backbone):
            for block in stage:
                if block in own and not any(block is cut for cut in cuts):
                    block.compile()
        for decoders in self._decoders.values():
            for decoder in decoders:
                decoder.compile()

    def _local_step(self, model: LocalWrapper, kept: Callable[[], AbstractContextManager[Any]]) -> None:
        with self._precision(), kept():
            model.local_step(*self._images.chunk(2))


@cache
def _made(arch: str, image_size: int) -> nn.Module:
    return NETWORKS[arch].make(image_size)


def count(setting: Setting, row: Row, part_size: int | None = None) -> Counts:
    """Without numbers, under fake tensors."""
    fake = FakeTensorMode()
    with FakeCopyMode(fake):
        backbone = deepcopy(_made(setting.arch, setting.image_size))
    with fake:
        steps = Steps(setting, backbone, setting.images())
        weights = sum(weight.nbytes for weight in steps.model(row).parameters())
        return Counts(*measure(steps.step(row, part_size)), 2 * weights)


def largest_batch(small: tuple[int, Counts], large: tuple[int, Counts], image_size: int, budget: float) -> int:
    """Images, of two views each, for which weights, their gradients, the views and the peak fit, by a line through two."""
    (few, less), (many, more) = small, large
    per_image = (more.peak_bytes - less.peak_bytes) / (many - few)
    constant = more.peak_bytes - many * per_image + more.fixed_bytes
    return max(0, int((budget - constant) // (per_image + 2 * 3 * 4 * image_size**2)))


def interleaved(steps: Mapping[str, Step], repeats: int, progress: Callable[[Iterable[Any]], Iterable[Any]]) -> Any:
    """Seconds of each step, `repeats` times in turn; what disturbs the machine for a while disturbs all of them."""
    for step in progress(list(steps.values())):
        step()
    times: dict[str, list[float]] = {key: [] for key in steps}
    for key in progress(list(steps) * repeats):
        synchronize()
        start = time.perf_counter()
        steps[key]()
        synchronize()
        times[key].append(time.perf_counter() - start)
    return times


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cuda_peak(step: Step) -> int:
    """The most bytes that a step adds on the GPU."""
    step()
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    synchronize()
    return torch.cuda.max_memory_allocated() - before
