"""Batches for the backbone: several random views of the images of each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from images import Images
from torch import Tensor
from views import Views


def view_batches(
    images: Images,
    steps: Sequence[tuple[int, Tensor]],
    view: Views,
    device: torch.device,
    views: int = 2,
    workers: int = 0,
    augment_on: Literal["device", "worker"] = "device",
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """For each `(seed, indices)` the images' views, `(N, 3, S, S)` each, and their labels, on the device."""
    for seed, indices in steps:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            batch = images.train[indices].to(device)
            seen = [view(batch).expand(-1, 3, -1, -1) for _ in range(views)]
        yield seen, images.train_labels[indices].to(device)
