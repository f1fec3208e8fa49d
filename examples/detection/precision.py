"""COCO's average precision of boxes and masks."""

from __future__ import annotations

import extra
import numpy as np
import torch
import torch.distributed as dist
from batches import images_to_detect
from instances import InstanceSet, boxes_of, labels_of, masks_of
from pretraining.processes import Processes
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from tqdm import tqdm

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
KEYS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")  # torchmetrics' names for them


def new_metric() -> MeanAveragePrecision:
    """With thresholds in float64, as pycocotools has them; torchmetrics' own, in float32, give figures off by up to 0.001."""
    metric = MeanAveragePrecision(
        iou_type=("bbox", "segm"),
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
        backend="faster_coco_eval",
        sync_on_compute=False,  # `gather` does it
    )
    metric.warn_on_many_detections = False
    return metric


@torch.no_grad()
def average_precision(
    model: nn.Module,
    found: InstanceSet,
    device: torch.device,
    processes: Processes = Processes(0, 1, 0),  # noqa: B008 - it is frozen
    workers: int = 0,
) -> dict[str, dict[str, float]]:
    """`{"box": {"AP": ..., "AP50": ..., ...}, "mask": {...}}` in 0..1 (-1 where there is nothing of that size), on all images.

    Crowds count neither for nor against a detection. An image whose file cannot be read is one where nothing is detected.
    Several processes share the images; the figures are those of all, on the one that leads; the others get `{}`.
    """
    metric, training = new_metric(), model.training
    model.eval()
    images = images_to_detect(found, device, workers, processes.rank, processes.size)
    total = len(range(processes.rank, len(found.photos), processes.size))
    shown = None if processes.leads else True
    for photo, image in tqdm(images, total=total, desc="detecting", unit="image", disable=shown, leave=False):
        detected = nothing() if image is None else detections(model, image)
        truth = {
            "boxes": boxes_of(photo.instances),
            "labels": labels_of(photo.instances),
            "masks": masks_of(photo.instances, photo).bool(),
            "iscrowd": torch.tensor([int(instance.crowd) for instance in photo.instances]),
            "area": torch.tensor([instance.area for instance in photo.instances]),
        }
        metric.update([detected], [truth])
    model.train(training)
    gather(metric, processes)
    return figures(metric) if processes.leads else {}


def detections(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """What the model finds in an image, on the CPU: boxes `(N, 4)`, labels and scores `(N,)`, masks `(N, H, W)`, bool."""
    (found,) = model([image])
    found["masks"] = found["masks"].squeeze(1) >= 0.5  # before they leave the device: as floats they are large
    return {name: value.cpu() for name, value in found.items()}


def nothing() -> dict[str, Tensor]:
    """What is found in an image that cannot be read."""
    return {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
        "masks": torch.zeros(0, 1, 1, dtype=torch.bool),
    }


def gather(metric: MeanAveragePrecision, processes: Processes) -> None:
    """Put what all processes have seen into each one's metric, which cannot do it itself for unequal numbers of images."""
    if processes.size == 1:
        return
    for name, seen in metric.metric_state.items():
        parts: list[list[object]] = [[] for _ in range(processes.size)]
        dist.all_gather_object(parts, seen)
        setattr(metric, name, [item for part in parts for item in part])


def figures(metric: MeanAveragePrecision) -> dict[str, dict[str, float]]:
    computed = metric.compute()
    return {
        name: {figure: float(computed[f"{kind}_{key}"]) for figure, key in zip(FIGURES, KEYS, strict=True)}
        for name, kind in (("box", "bbox"), ("mask", "segm"))
    }
