"""Random views of images: what SimCLR asks to be told apart from other images and recognised as the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from inputs.simclr import SimCLRViews, TorchvisionViews

Views = Callable[[Tensor], Tensor]

LARGEST_SMALL_IMAGE = 64  # pixels; up to here colours are changed half as strongly and nothing is blurred


def scaled(images: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1]: what the networks see, in training and in evaluation."""
    return images.float() / 127.5 - 1


def grey_views(images: Tensor) -> Tensor:
    """Shift, turn, scale and shear each `(1, S, S)` image, change its brightness and contrast, add noise.

    The whole batch at once, each image with a draw of its own (torchvision draws once for a batch, and image by image
    it takes longer than a training step of a small network). Scale 0.75..1.15, turn +-15 degrees, shear
    +-0.2, shift +-12 % of the image's side, contrast and brightness x 0.6..1.4, noise of standard deviation 0.05.
    Handwriting is not flipped: the mirror image of a 2 is no digit.
    """
    n = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n, device=images.device).uniform_(low, high)

    angle, shear, scale = uniform(-math.pi / 12, math.pi / 12), uniform(-0.2, 0.2), 1 / uniform(0.75, 1.15)
    x = torch.stack([scale * angle.cos(), scale * (shear - angle.sin()), uniform(-0.24, 0.24)], dim=1)
    y = torch.stack([scale * angle.sin(), scale * angle.cos(), uniform(-0.24, 0.24)], dim=1)
    grid = F.affine_grid(torch.stack([x, y], dim=1), list(images.shape), align_corners=False)  # (N, S, S, 2)
    pixels = F.grid_sample(images.float() / 255, grid, align_corners=False)  # (N, 1, S, S)

    contrast, brightness = uniform(0.6, 1.4).view(n, 1, 1, 1), uniform(0.6, 1.4).view(n, 1, 1, 1)
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    pixels = brightness * (mean + contrast * (pixels - mean)) + 0.05 * torch.randn_like(pixels)
    return pixels.clamp(0, 1) * 2 - 1


def shifted_views(images: Tensor, by: int = 4) -> Tensor:
    """Each image shifted by up to `by` pixels each way, its edges reflected, and mirrored half of the time.

    What networks learn CIFAR-10's labels from (He et al. 2016, Section 4.2). The draws are made on the CPU, so that a seed
    gives the same views on every device.
    """
    n, _, height, width = images.shape
    down, right = torch.randint(2 * by + 1, (2, n, 1))  # (N, 1) each
    mirrored = torch.rand(n, 1) < 0.5
    rows = down + torch.arange(height)  # (N, H)
    columns = right + torch.where(mirrored, torch.arange(width - 1, -1, -1), torch.arange(width))  # (N, W)
    padded = F.pad(scaled(images), [by] * 4, mode="reflect")
    rows, columns, each = (index.to(images.device) for index in (rows, columns, torch.arange(n)))
    shifted = padded[each.view(n, 1, 1), :, rows.unsqueeze(2), columns.unsqueeze(1)]  # (N, H, W, C)
    return shifted.permute(0, 3, 1, 2)


def simclr_views(size: int) -> SimCLRViews:
    """SimCLR's views of `size` pixels a side, by batches."""
    return SimCLRViews(size, *_strength_and_blur(size))


def torchvision_views(size: int) -> TorchvisionViews:
    """The same, image by image."""
    return TorchvisionViews(size, *_strength_and_blur(size))


def crop_views(size: int) -> SimCLRViews:
    """Random resized crop and flip alone: what a linear read-out is trained on."""
    return SimCLRViews(size, strength=0, blur=0, greyed=0)


def _strength_and_blur(size: int) -> tuple[float, int]:
    """Colour strength, and pixels of the blur's kernel.

    Up to 64 pixels as for CIFAR-10 (Chen et al. 2020, appendix B.9): strength 0.5, no blur. Larger images as ImageNet's
    (appendix A): strength 1, and a kernel of a tenth of the side, 23 pixels of 224.
    """
    return (0.5, 0) if size <= LARGEST_SMALL_IMAGE else (1.0, 2 * (size // 20) + 1)
