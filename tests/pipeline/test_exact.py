"""Two and four gloo processes: after each step of a pipeline the weights are those of one process, to the bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TypeAlias

import cases
import processes
import pytest

Layout: TypeAlias = tuple[str, list[int]]  # a case, and how many stages each rank has

LAYOUTS: dict[int, list[Layout]] = {
    2: [
        *(("loco", ranks) for ranks in ([2, 2], [1, 3], [3, 1])),
        *(("overlap 2", ranks) for ranks in ([3, 2], [1, 4])),
        ("gim", [2, 2]),
        ("upper only", [2, 2]),
        ("nested", [1, 3]),
        ("nested", [3, 1]),
        ("resnet50", [2, 2]),
        ("resnet50", [1, 3]),
        ("convnext", [1, 2]),
        ("convnext", [2, 1]),
        ("vit", [2, 2]),
        ("vit", [3, 1]),
        ("encoder", [2, 2]),
        ("encoder", [1, 3]),
        ("pairs", [2, 2]),
        ("pairs", [1, 3]),
    ],
    4: [
        ("loco", [1, 1, 1, 1]),
        ("gim", [1, 1, 1, 1]),
        ("upper only", [1, 1, 1, 1]),
        ("overlap 2", [2, 1, 1, 1]),
        ("overlap 3", [1, 1, 2, 1]),
        ("end to end", [1, 1, 1, 1]),
        ("encoder", [1, 1, 1, 1]),
        ("pairs", [1, 1, 1, 1]),
    ],
}
FULL = [(name, ranks) for name in ("resnet18", "shufflenet", "sequential") for ranks in ([2, 2], [3, 1])]
FULL += [("swin", ranks) for ranks in ([2, 1], [1, 2])]


EAGER: dict[int, list[Layout]] = {
    2: [("loco", [2, 2]), ("pairs", [2, 2]), ("upper only", [1, 3]), ("vit", [3, 1]), ("resnet50", [2, 2])],
    4: [("loco", [1, 1, 1, 1]), ("encoder", [1, 1, 1, 1])],
}


def work(rank: int, layouts: list[Layout], eager: list[Layout]) -> dict[str, float]:
    warnings.filterwarnings("ignore", message="rank . has . of the stages")
    found = {f"{name} {ranks}": cases.compare(name, ranks, rank) for name, ranks in layouts}
    for name, ranks in eager:
        for optimizer in (cases.sgd, cases.adamw):
            found[f"{name} {ranks}, eager, {optimizer.__name__}"] = cases.compare_eager(name, ranks, rank, optimizer)
    return found


@pytest.mark.parametrize("world", LAYOUTS)
def test_weights_losses_and_buffers_are_those_of_one_process(world: int, tmp_path: Path, full: bool) -> None:
    more = FULL if full and world == 2 else []
    for found in processes.run(work, world, tmp_path, LAYOUTS[world] + more, EAGER[world]):
        assert not {layout: off for layout, off in found.items() if off}


def test_a_hugging_face_encoder_with_a_padding_mask(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    layouts = [(name, ranks) for name in ("bert", "bert by name") for ranks in ([2, 2], [1, 3])]
    for found in processes.run(work, 2, tmp_path, layouts, []):
        assert not {layout: off for layout, off in found.items() if off}
