"""torchvision's transforms for whole batches, each image with parameters of its own: `(N, C, H, W)` in 0..1, on any device.

Each does to image n of a batch what torchvision.transforms.v2.functional does to one image with the n-th parameters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor

GREY = (0.2989, 0.587, 0.114)


def resized_crop(images: Tensor, boxes: Tensor, flipped: Tensor, size: int) -> Tensor:
    """Image n's box `boxes[n] = (top, left, height, width)`, brought to `size` pixels a side, mirrored where `flipped[n]`.

    Bilinear, without antialiasing: for boxes that are not larger than what they are brought to.
    """
    top, left, height, width = (edge.view(-1, 1) for edge in boxes.to(images.dtype).T)  # (N, 1) each
    steps = (torch.arange(size, device=images.device, dtype=images.dtype) + 0.5) / size  # (size,)
    rows = (top + steps * height - 0.5).clamp(min=top, max=top + height - 1)  # (N, size), pixels' centres
    columns = (left + torch.where(flipped.view(-1, 1), 1 - steps, steps) * width - 0.5).clamp(left, left + width - 1)
    x, y = (2 * columns + 1) / images.shape[-1] - 1, (2 * rows + 1) / images.shape[-2] - 1
    grid = torch.stack([x.unsqueeze(1).expand(-1, size, -1), y.unsqueeze(2).expand(-1, -1, size)], dim=3)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def grey(images: Tensor) -> Tensor:
    """`(N, 3, H, W) -> (N, 1, H, W)`."""
    return einsum(images, images.new_tensor(GREY), "n c h w, c -> n h w").unsqueeze(1)


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    return (images * factors.view(-1, 1, 1, 1)).clamp_(0, 1)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    return _blend(images, reduce(grey(images), "n 1 h w -> n 1 1 1", "mean"), factors)


def saturation(images: Tensor, factors: Tensor) -> Tensor:
    return _blend(images, grey(images), factors)


def _blend(images: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    return torch.lerp(other.expand_as(images), images, factors.view(-1, 1, 1, 1)).clamp_(0, 1)


def hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the colours' circle by `turns` (-0.5..0.5 of it), value and saturation as they were."""
    low, value = torch.aminmax(images, dim=1, keepdim=True)
    chroma = value - low  # (N, 1, H, W)
    red, green, blue = images.split(1, dim=1)
    sixth = torch.where(
        value == red,
        (green - blue),
        torch.where(value == green, 2 * chroma + (blue - red), 4 * chroma + (red - green)),
    ) / torch.where(chroma == 0, 1, chroma)
    sixth += 6 * turns.view(-1, 1, 1, 1)  # 0..6 round the circle
    # channel c of a colour of hue h is value - chroma * clamp(min(k, 4 - k), 0, 1), where k = (c's place + h) mod 6
    k = (sixth + images.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)).remainder_(6)
    return torch.addcmul(value, chroma, torch.minimum(k, 4 - k).clamp_(0, 1), value=-1)


def gaussian_blur(images: Tensor, sigmas: Tensor, width: int) -> Tensor:
    """Blur with a kernel of `width` (odd) pixels and standard deviation `sigmas[n]`, edges reflected."""
    n = len(images)
    offsets = torch.arange(width, device=images.device, dtype=images.dtype) - width // 2
    kernels = torch.softmax(-0.5 * (offsets / sigmas.view(-1, 1)) ** 2, dim=1)  # (N, width)
    kernels = kernels.repeat_interleave(images.shape[1], dim=0).unsqueeze(1)  # (N C, 1, width)
    planes = F.pad(images, [width // 2] * 4, mode="reflect")
    planes = rearrange(planes, "n c h w -> 1 (n c) h w")
    planes = F.conv2d(planes, kernels.unsqueeze(2), groups=len(kernels))
    planes = F.conv2d(planes, kernels.unsqueeze(3), groups=len(kernels))
    return rearrange(planes, "1 (n c) h w -> n c h w", n=n)
