"""Mask R-CNN on any backbone, as the paper has it: normalised in all new layers, with four convolutions in its box head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pyramid import Body, Mode, Pyramid
from reading.encoders import Encoder
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

LOSSES = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")
ANCHOR = 8  # an anchor's side in strides of its level: 32 pixels at stride 4


@dataclass(frozen=True)
class Size:
    """How wide the new layers are, and how large the images.

    Attributes:
        width: channels of the pyramid and of the heads' convolutions.
        hidden: outputs of the box head's fully connected layer.
        rois: regions of each image that the box head learns from.
        shorter: pixels of an image's shorter side: one of them is drawn to train on, the last is taken to detect.
        longest: pixels that the longer side may have.
    """

    width: int = 256
    hidden: int = 1024
    rois: int = 512
    shorter: tuple[int, ...] = (800,)
    longest: int = 1333


def mask_rcnn(encoder: Encoder, classes: int, mode: Mode, size: Size, device: torch.device) -> MaskRCNN:
    """Torchvision's Mask R-CNN for `classes` classes, on the encoder's own backbone.

    Every convolution of the pyramid, of the box head and of the mask head is followed by SyncBatchNorm on GPUs, by
    BatchNorm elsewhere; the mask head's transposed convolution and the predictors by none, as in mmdetection and detectron2.
    """
    norm: type[nn.Module] = nn.BatchNorm2d
    if device.type == "cuda":
        norm = nn.SyncBatchNorm
        nn.SyncBatchNorm.convert_sync_batchnorm(encoder.backbone)
    body = Body(encoder.backbone, encoder.stages, mode)
    levels = [str(level) for level in range(len(body.strides))]
    sides = [(ANCHOR * stride,) for stride in (*body.strides, 2 * body.strides[-1])]
    width = size.width
    model = MaskRCNN(
        Pyramid(body, width, norm),
        min_size=size.shorter,
        max_size=size.longest,
        image_mean=list(encoder.mean),
        image_std=list(encoder.std),
        rpn_anchor_generator=AnchorGenerator(sides, len(sides) * [(0.5, 1.0, 2.0)]),
        box_roi_pool=MultiScaleRoIAlign(levels, 7, sampling_ratio=2),
        box_head=FastRCNNConvFCHead((width, 7, 7), 4 * [width], [size.hidden], norm),
        box_batch_size_per_image=size.rois,
        box_predictor=FastRCNNPredictor(size.hidden, classes + 1),
        mask_roi_pool=MultiScaleRoIAlign(levels, 14, sampling_ratio=2),
        mask_head=MaskRCNNHeads(width, 4 * [width], 1, norm),
        mask_predictor=MaskRCNNPredictor(width, width, classes + 1),
    )
    model.transform.size_divisible = body.strides[-1]
    return model.to(device)
