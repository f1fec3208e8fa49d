"""What `local_step` costs beside what it computes: hooks, checks, walks over graphs.

    python benchmarks/overhead.py

On a net whose stages do next to nothing, time is compared with the same calls of autograd, written out by hand
(`rivals.by_hand`). On a real step a profile tells how long Python stays in the package's own lines; a profile makes them
slower, so that this bounds them from above.
"""

from __future__ import annotations

import cProfile
import gc
import pstats
from collections.abc import Callable
from pathlib import Path
from statistics import median

import rivals
import torch
from rivals import Net
from steps import interleaved
from torch import Tensor, nn

import locallearn
from locallearn import LocalWrapper

OWN = str(Path(locallearn.__file__).parent)
COMPUTE = ("decoders", "losses", "models")  # what a step would call without us


class Scale(nn.Module):
    """A stage of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, features: Tensor) -> Tensor:
        return features * self.weight


def alike(z0: Tensor, z1: Tensor) -> Tensor:
    return (z0 * z1).sum()


def per_stage(stages: int = 64, repeats: int = 50, device: str = "cpu") -> tuple[float, float]:
    """Microseconds that a stage of LoCo takes in `local_step`, and by hand, on vectors of 8 numbers."""
    net = nn.Sequential(*[Scale() for _ in range(stages)]).to(device)
    images = torch.rand(8, 8, device=device)
    model = LocalWrapper(net, range(stages), 1, lambda width: nn.Identity(), loss=alike, example=images[:2])
    bare = Net([[stage] for stage in net], model.decoders, model.plan, criterion=alike)
    steps = {"ours": lambda: model.local_step(*images.chunk(2)), "by hand": lambda: rivals.by_hand(bare, images)}
    times = interleaved(steps, repeats, iter)
    return tuple(1e6 * median(times[key]) / stages for key in steps)


def own_seconds(step: Callable[[], object]) -> float:
    """How long Python stays in lines of the package during a step, less what is decoders' and losses'.

    Give a step of few images: the lines take as long with many, but the profile adds to them the time in which memory that
    they let go of returns to the system.
    """
    profile = cProfile.Profile()
    step()
    gc.collect()
    gc.disable()  # or some line would be charged with a collection
    try:
        profile.runcall(step)
    finally:
        gc.enable()
    functions = pstats.Stats(profile).stats.items()  # (file, line, name) -> (calls, primitive calls, own seconds, ...)
    return sum(
        spent[2]
        for (file, _, _), spent in functions
        if file.startswith(OWN) and not Path(file).relative_to(OWN).parts[0].startswith(COMPUTE)
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    ours, bare = per_stage()
    print(
        f"a stage of one weight takes {ours / bare:.2f} times as long as by hand ({ours:.0f} and {bare:.0f} microseconds)"
    )
