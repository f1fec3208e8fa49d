"""What a step of a row costs: memory and computation, counted; time, measured row by row in turn."""

from __future__ import annotations

import platform
import statistics
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from inputs.image_sets import Images
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from curves.graphed import GraphedStep
from curves.network import first, new_training, wrapped
from curves.presets import START, Curve, Job, Setting
from locallearn.memory import Cost, measure


def counted(setting: Setting, row: str, image_size: int, batch_size: int, recompute: bool = False) -> Cost:
    """What a step costs, counted on fake tensors: weights, their gradients and the images do not count."""
    made, fake = (
        wrapped(setting, row, setting.backbone(image_size), image_size, 10, recompute=recompute),
        FakeTensorMode(),
    )
    with FakeCopyMode(fake):
        model = deepcopy(made)
    with fake:
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        supervised = setting.task == "supervised"
        views = [torch.zeros(batch_size, 3, image_size, image_size) for _ in range(1 if supervised else 2)]
        labels = torch.zeros(batch_size, dtype=torch.long) if supervised else None
        return measure(lambda: model.local_step(*views, targets=labels))


def costs(setting: Setting, row: str, image_size: int) -> dict[str, Any]:
    size = setting.batch_size
    once, twice = (counted(setting, row, image_size, count) for count in (size, 2 * size))
    return {
        "flops": once.flops,
        "peak_bytes": once.peak_bytes,
        "peak_bytes_per_image": (twice.peak_bytes - once.peak_bytes) / size,
        "peak_bytes_recomputed": counted(setting, row, image_size, size, recompute=True).peak_bytes,
    }


def time_steps(curve: Curve, images: Images, steps: int, on: torch.device) -> list[dict[str, Any]]:
    """What a step takes in each row, the median of `steps`: the rows in turn, so that all see the same moods of the machine.

    On a CPU it is this process's CPU time, which others at work disturb less; on a GPU the clock's, of a CUDA graph.
    """
    setting = curve.setting
    images = first(images, setting)
    trainings = {
        row: new_training(Job(curve.name, setting, row, 0), images, 1000, on) for row in curve.rows if row != START
    }
    supervised = setting.task == "supervised"
    views = [torch.rand(setting.batch_size, 3, images.size, images.size, device=on) for _ in range(2 - supervised)]
    views = [pixels.contiguous(memory_format=torch.channels_last) for pixels in views]
    labels = images.train_labels[: setting.batch_size].to(on) if supervised else None
    local_steps = {row: GraphedStep(training.model) for row, training in trainings.items()}
    took: dict[str, list[float]] = {row: [] for row in trainings}
    warm_up = GraphedStep.EAGER + 1 if on.type == "cuda" else 2  # not counted
    for _ in range(steps + warm_up):
        for row, training in trainings.items():
            start = clock(on)
            local_steps[row](views, labels)
            training.update()
            took[row].append(clock(on) - start)
    where = f"{machine(on)}, {torch.get_num_threads()} threads, {platform.machine()}"
    return [
        {
            "curve": curve.name,
            "row": row,
            "step_ms": 1e3 * statistics.median(seconds[warm_up:]),
            "steps": steps,
            "machine": where,
        }
        for row, seconds in took.items()
    ]


def clock(on: torch.device) -> float:
    if on.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(on)
    return time.perf_counter()


def machine(on: torch.device) -> str:
    if on.type == "cuda":
        return torch.cuda.get_device_name(on)
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(": ")[2] if names else platform.processor() or "cpu"
