"""What a training step of end-to-end SimCLR, Greedy InfoMax and LoCo costs in FLOPs and memory, counted exactly.

    python benchmarks/memory.py                    # ResNet-50, two views of 32 images of 224 pixels: 64 in one batch
    python benchmarks/memory.py --arch vit_b_16    # four equal stages of three transformer blocks

Runs under fake tensors: no GPU, no data, seconds on a CPU. The counts do not depend on the machine. They leave out what
all rows share (weights, their gradients, the images) and what a GPU's libraries and the allocator add.

"peak" is the most bytes that are alive at once, "saved" the most that are kept for a backward at once: what is rebuilt
in the backward counts for the peak only. The rows "blocks recomputed" have checkpoint=True, which recomputes every block,
and the stem; "blocks and stages recomputed" recompute the stages too, so that of a stage that two units share only its
inlet is kept between them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torchvision.models import get_model

from locallearn import ConvMLPDecoder, InfoNCE, LocalWrapper, MLPDecoder, TokenDecoder
from locallearn._policy import runs
from locallearn._recompute import Run, recomputed
from locallearn.measure import Cost, measure


class Family(NamedTuple):
    """Where the backbones of a family are cut, and the decoders that fit them, without and with a block."""

    stages: list[str]
    mlp: Callable[[int], nn.Module]
    block: Callable[[int], nn.Module]


FAMILIES = {
    "resnet": Family([f"layer{k}" for k in range(1, 5)], MLPDecoder, ConvMLPDecoder),
    "vit_b": Family(
        [f"encoder.layers.encoder_layer_{k}" for k in (2, 5, 8, 11)], partial(TokenDecoder, blocks=0), TokenDecoder
    ),
}


class Row(NamedTuple):
    """A way to train: locally with an overlap, or end to end where it is ``None``."""

    name: str
    overlap: int | None
    block: bool = True
    checkpoint: bool | tuple[bool, type[nn.Module]] = False


ROWS = [
    Row("end-to-end, MLP decoder (SimCLR)", None, block=False),
    Row("end-to-end, block + MLP decoder", None),
    Row("LoCo (`overlap=1`)", 1),
    Row("Greedy InfoMax (`overlap=0`)", 0),
    Row("end-to-end, blocks recomputed", None, checkpoint=True),
    Row("LoCo, blocks recomputed", 1, checkpoint=True),
    Row("LoCo, blocks and stages recomputed", 1, checkpoint=(True, nn.Sequential)),
    Row("Greedy InfoMax, blocks recomputed", 0, checkpoint=True),
]


def end_to_end_step(
    backbone: nn.Module, top: str, decoder: nn.Module, images: Tensor, runs: tuple[Run, ...] = ()
) -> None:
    """A step of plain training, in which nothing of the wrapper takes part; ``runs`` are checkpointed."""
    outlets: list[Tensor] = []
    handle = backbone.get_submodule(top).register_forward_hook(lambda module, args, output: outlets.append(output))
    with recomputed(backbone, runs, lambda: True):
        backbone(images)
    handle.remove()
    InfoNCE()(*decoder(outlets.pop()).chunk(2)).backward()


def cost(row: Row, arch: str, batch_size: int) -> Cost:
    """Counts the second step, when the gradients of the weights are already there."""
    family = next(family for prefix, family in FAMILIES.items() if arch.startswith(prefix))
    overlap = len(family.stages) - 1 if row.overlap is None else row.overlap
    backbone, fake = get_model(arch), FakeTensorMode()
    with FakeCopyMode(fake):
        backbone = deepcopy(backbone)
    with fake:
        images = torch.zeros(2 * batch_size, 3, 224, 224)
        decoder = family.block if row.block else family.mlp
        model = LocalWrapper(backbone, family.stages, overlap, decoder, checkpoint=row.checkpoint)
        chosen = runs(backbone, family.stages, row.checkpoint, images)

        def step() -> None:
            if row.overlap is None:
                end_to_end_step(backbone, family.stages[-1], model.decoders[0], images, chosen)
            else:
                model.local_step(*images.chunk(2))

        step()
        return measure(step)


def rows(arch: str) -> list[Row]:
    """All of them, less those that recompute whole stages where a stage is not one module."""
    return [row for row in ROWS if arch.startswith("resnet") or not isinstance(row.checkpoint, tuple)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet50", help="a ResNet or ViT-B of torchvision (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images; each has two views (default: %(default)s)")
    options = parser.parse_args()
    if not options.arch.startswith(tuple(FAMILIES)):
        parser.error(f"--arch is one of torchvision's that begins with {' or '.join(FAMILIES)}; got {options.arch!r}")

    print(f"{options.arch}, two views of {options.batch_size} images of 224 pixels, fp32, torch {torch.__version__}\n")
    print("| training | GFLOP | | peak, MB | less by | saved, MB | less by |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    base: Cost | None = None
    for row in rows(options.arch):
        now = cost(row, options.arch, options.batch_size)
        base = base or now
        print(
            f"| {row.name} | {now.flops / 1e9:,.0f} | {now.flops / base.flops:.2f}x "
            f"| {now.peak_bytes / 1e6:,.0f} | {base.peak_bytes / now.peak_bytes:.2f}x "
            f"| {now.saved_bytes / 1e6:,.0f} | {base.saved_bytes / now.saved_bytes:.2f}x |"
        )


if __name__ == "__main__":
    main()
