"""The curves of overlap_curve.py: what all rows of one share, and the grids that fit two cores, minutes of a GPU, or days.

No setting was chosen by what came out of it. The pilots have a seed that no curve uses, and are part of the results.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from backbones import ARCHITECTURES, CIFAR_DEPTHS
from torch import nn

from locallearn import Plan, UpperOnly
from locallearn.models import resnet_cifar_stages

# rows beside the overlaps: nothing trained; HPFF's overlaps 0 and 1 together; overlap 1 of which only the upper loss updates
# a shared stage, as Interlocking Backprop's pairwise mode; deep supervision; and of the paper's Table 5 private copies of the
# shared stage, tied by a penalty, and the first block of each stage alone that is shared
START, BOTH, UPPER, DEEP, SOFT, FIRST = "start", "both", "upper", "deep", "soft", "first"
SHARINGS = {SOFT: "soft-1e-3", FIRST: "first-block"}  # by their names in pretraining/methods.py
PILOT = 100  # the pilots' seed; their curves' names begin with "pilot-"


@dataclass(frozen=True)
class Setting:
    """What all rows of a curve share: they differ in their plans, and in nothing else."""

    task: Literal["supervised", "contrastive"]
    arch: str  # resnet20, resnet32, ...: He et al.'s; or one of backbones.py
    stages: int
    decoder: str = "mlp"  # by its name in pretraining/methods.py; the same for all units of all rows
    images: int | None = 10_240  # to train on, the first ones; None: all
    held_out: int | None = 5_000  # likewise
    epochs: int = 5
    batch_size: int = 256
    optimizer: str = "adamw"
    lr: float = 2e-3
    weight_decay: float = 1e-2
    warm_up: float = 0.1  # of all steps; a cosine follows
    temperature: float = 0.2

    @property
    def names(self) -> tuple[str, ...]:
        """The submodules after which the stages end."""
        if self.arch in CIFAR_DEPTHS:
            return resnet_cifar_stages(CIFAR_DEPTHS[self.arch], self.stages)
        names = ARCHITECTURES[self.arch].stages
        if self.arch == "resnet18" and self.stages == 8:
            names = tuple(f"{layer}.{block}" for layer in names for block in (0, 1))
        if len(names) != self.stages:
            raise ValueError(f"{self.arch} has {len(names)} stages here; got stages={self.stages}")
        return names

    def backbone(self, image_size: int) -> nn.Module:
        return ARCHITECTURES[self.arch].make(image_size)


@dataclass(frozen=True)
class Curve:
    """A setting, the plans to compare in it, and the seeds."""

    name: str
    setting: Setting
    rows: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """One run: a point of a curve for one seed."""

    curve: str
    setting: Setting
    row: str
    seed: int

    @property
    def place(self) -> str:
        return f"{self.curve}/{self.row}/seed-{self.seed}"


def plan_of(row: str, stages: int) -> Plan:
    """The plan of a row: an overlap as it is written, or one of the names above."""
    if row == START:
        return Plan.end_to_end(stages)  # never trained
    if row == UPPER:
        return UpperOnly().plan(stages, overlap=1)
    named = {BOTH: Plan.hierarchical, DEEP: Plan.deep_supervision}
    return named[row](stages) if row in named else Plan.windows(stages, int(row))


def jobs(curves: tuple[Curve, ...]) -> Iterator[Job]:
    """Curve by curve, seed by seed, so that a curve with one seed is there as early as can be."""
    for curve in curves:
        for seed in curve.seeds:
            for row in curve.rows:
                yield Job(curve.name, curve.setting, row, seed)


def _overlaps(*overlaps: int, start: bool = False) -> tuple[str, ...]:
    return (*([START] if start else []), *map(str, overlaps))


BLOCKS = Setting("supervised", "resnet20", stages=9)  # each residual block a stage
THIRDS = replace(BLOCKS, stages=4)
DEEPER = replace(BLOCKS, arch="resnet32", stages=16)  # the stem a stage too
VIEWS = Setting("contrastive", "presnet_small", stages=6)
SEEDS = (0, 1, 2)


def _tables(setting: Setting, seeds: tuple[int, ...], end: str = "") -> Iterator[Curve]:
    """What of the paper's Tables 4 and 5 is no row of the curve of `setting`; `end`: of the names.

    "-3": three blocks a stage, without which there is no first block to share.
    """
    for decoder, rows in (("conv-no-downsampling", "0"), ("mlp4", "05"), ("conv+mlp4", "1")):
        yield Curve(f"contrastive-6-{decoder}{end}", replace(setting, decoder=decoder), tuple(rows), seeds)
    sharing = replace(setting, arch="presnet_small-3", decoder="conv+mlp4")
    yield Curve(f"contrastive-6-sharing{end}", sharing, ("0", "1", UPPER, SOFT, FIRST), seeds)


CPU = (
    Curve("pilot-supervised-9", BLOCKS, _overlaps(0, 1, 8), (PILOT,)),
    Curve("pilot-supervised-9-conv", replace(BLOCKS, decoder="conv"), _overlaps(0, 1, 8), (PILOT,)),
    Curve("supervised-9", BLOCKS, (*_overlaps(0, 8, 1, 2, 4, start=True), BOTH), SEEDS),
    Curve("pilot-supervised-4", THIRDS, _overlaps(0, 3), (PILOT,)),
    Curve("pilot-supervised-4-conv", replace(THIRDS, decoder="conv"), _overlaps(0, 3), (PILOT,)),
    Curve("supervised-4", THIRDS, (*_overlaps(0, 3, 1, 2), BOTH), SEEDS),
    Curve("contrastive-6", VIEWS, _overlaps(0, 5, 1, 2, start=True), SEEDS),
    Curve("contrastive-6-conv", replace(VIEWS, decoder="conv"), _overlaps(0, 5, 1, 2), SEEDS),
    *_tables(VIEWS, SEEDS[:2]),
    Curve("supervised-9", BLOCKS, (UPPER, DEEP), SEEDS),
    Curve("supervised-9-1c2f", replace(BLOCKS, decoder="1c2f"), (*_overlaps(0, 8, 1), BOTH), SEEDS),
    Curve("contrastive-6-grid", replace(VIEWS, decoder="grid"), _overlaps(0, 5, 1), SEEDS),
    Curve("contrastive-9", replace(BLOCKS, task="contrastive"), _overlaps(0, 8, 1, 2, 4, start=True), SEEDS),
    Curve("supervised-9-conv", replace(BLOCKS, decoder="conv"), (*_overlaps(0, 8, 1, 2, 4), BOTH), SEEDS),
    Curve("supervised-9-longer", replace(BLOCKS, epochs=20), (*_overlaps(0, 8, 1, 2, 4), BOTH), SEEDS),
    Curve("supervised-16", DEEPER, (*_overlaps(0, 15, 1, 2, 4, 8, start=True), BOTH), SEEDS),
)

# InfoPro's recipe (Wang et al. 2021) but for its decay of biases and norms: SGD with Nesterov's momentum, batch 1024, 0.8
FULL = Setting(
    "supervised",
    "resnet32",
    stages=16,
    images=None,
    held_out=None,
    epochs=160,
    batch_size=1024,
    optimizer="nesterov",
    lr=0.8,
    weight_decay=1e-4,
    warm_up=1 / 16,
)
SIMCLR = replace(
    FULL,
    task="contrastive",
    arch="resnet18",
    stages=8,
    epochs=200,
    batch_size=512,
    optimizer="sgd",
    lr=0.12,
    weight_decay=5e-4,
    warm_up=0.05,
)
GPU = (
    Curve("supervised-16", FULL, (*_overlaps(0, 15, 1, 2, 4, 8, start=True), BOTH), (0, 1, 2, 3, 4)),
    Curve("simclr-8", SIMCLR, (*_overlaps(0, 7, 1, 2, 4, start=True), BOTH), (0, 1, 2, 3, 4)),
)
# Half of CIFAR-10 and ten epochs, a thousand steps a run; in an order of value, so that it can end anywhere
VIEWS_SHORT = replace(VIEWS, images=25_600, epochs=10)
BLOCKS_SHORT = replace(BLOCKS, images=25_600, epochs=10)
GPU_SHORT = (
    Curve("supervised-9-short", BLOCKS_SHORT, (*_overlaps(0, 8, 1, 2, 4, start=True), BOTH), SEEDS),
    Curve("contrastive-6-short", VIEWS_SHORT, _overlaps(0, 5, 1, 2, start=True), SEEDS),
    Curve("contrastive-6-conv-short", replace(VIEWS_SHORT, decoder="conv"), _overlaps(0, 5, 1, 2), SEEDS),
    *_tables(VIEWS_SHORT, SEEDS[:2], "-short"),
    Curve("supervised-4-short", replace(BLOCKS_SHORT, stages=4), (*_overlaps(0, 3, 1, 2), BOTH), SEEDS),
    Curve("supervised-9-conv-short", replace(BLOCKS_SHORT, decoder="conv"), _overlaps(0, 8, 1, 2, 4), SEEDS),
)
IMAGENETTE = (
    Curve(
        "imagenette-6",
        replace(VIEWS, decoder="conv", images=None, held_out=None, epochs=20),
        _overlaps(0, 5, 1, start=True),
        SEEDS[:2],
    ),
)
# tables and pictures show them in this order
PRESETS = {"gpu": GPU, "gpu-short": GPU_SHORT, "imagenette": IMAGENETTE, "cpu": CPU}
