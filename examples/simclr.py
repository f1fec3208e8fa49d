"""SimCLR's random views: batch by batch on any device, or image by image with torchvision."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from batch_transforms import brightness, contrast, gaussian_blur, grey, hue, resized_crop, saturation
from torch import Tensor
from torchvision.transforms import v2

RATIO = (3 / 4, 4 / 3)  # of a crop's width to its height
SIGMA = (0.1, 2.0)  # of the blur, pixels
JITTERED, GREYED, BLURRED, FLIPPED = 0.8, 0.2, 0.5, 0.5  # how many views, of one
ATTEMPTS = 10  # to find a crop that fits, as many as torchvision makes


@dataclass(frozen=True)
class Draws:
    """What chance decided for each image of a batch, on the CPU."""

    flipped: Tensor  # (N,) bool
    jittered: Tensor  # (N,) bool
    order: Tensor  # (N, 4): which change comes first, second, ...; of brightness, contrast, saturation, hue
    factors: Tensor  # (N, 4) of these, by their numbers
    greyed: Tensor  # (N,) bool
    blurred: Tensor  # (N,) bool
    sigmas: Tensor  # (N,)


@dataclass(frozen=True)
class SimCLRViews:
    """SimCLR's augmentations, a whole batch at once on the device where it lies: uint8 `(N, C, H, W)` -> `(N, 3, S, S)`.

    Random resized crop, flip, colour jitter in random order, grey, blur; each image with draws of its own. They are made
    on the CPU, so that a seed gives the same views on every device. Pixels come out as (x - mean) / std with x in 0..1.
    """

    size: int
    strength: float  # of the colour jitter
    blur: int  # pixels of the kernel; 0: none
    greyed: float = GREYED
    least_area: float = 0.08  # of a crop, in that of the image
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __call__(self, images: Tensor) -> Tensor:
        n, _, height, width = images.shape
        boxes, draws = draw_boxes(n, height, width, self.least_area), self.draw(n)
        device = images.device
        pixels = images.float().div_(255)
        crops = resized_crop(pixels, boxes.to(device), draws.flipped.to(device), self.size)
        return self._finished(crops, draws)

    @cached_property
    def crop(self) -> v2.Transform:
        """The first step alone, antialiased, for one image of any size: `(3, H, W) -> (3, S, S)`, uint8."""
        return v2.RandomResizedCrop(self.size, (self.least_area, 1.0), RATIO, antialias=True)

    def finish(self, crops: Tensor) -> Tensor:
        """All but the first step, for a batch of what `crop` made."""
        draws, pixels = self.draw(len(crops)), crops.float().div_(255)
        pixels = torch.where(draws.flipped.to(crops.device).view(-1, 1, 1, 1), pixels.flip(3), pixels)
        return self._finished(pixels, draws)

    def draw(self, n: int) -> Draws:
        reach = torch.tensor([0.8, 0.8, 0.8, 0.2]) * self.strength
        centre = torch.tensor([1.0, 1.0, 1.0, 0.0])
        low = torch.cat([(centre - reach)[:3].clamp(min=0), -reach[3:]])
        return Draws(
            flipped=torch.rand(n) < FLIPPED,
            jittered=(torch.rand(n) < JITTERED) & (self.strength > 0),
            order=torch.rand(n, 4).argsort(dim=1),
            factors=low + (centre + reach - low) * torch.rand(n, 4),
            greyed=torch.rand(n) < self.greyed,
            blurred=(torch.rand(n) < BLURRED) & (self.blur > 0),
            sigmas=torch.empty(n).uniform_(*SIGMA),
        )

    def _finished(self, pixels: Tensor, draws: Draws) -> Tensor:
        if pixels.shape[1] == 1:
            pixels = pixels.repeat(1, 3, 1, 1)
        for place in range(4):
            for kind, change in enumerate((brightness, contrast, saturation, hue)):
                chosen = draws.jittered & (draws.order[:, place] == kind)
                _change(pixels, chosen, change, draws.factors[:, kind])
        _change(pixels, draws.greyed, lambda chosen: grey(chosen).expand(-1, 3, -1, -1))
        _change(pixels, draws.blurred, partial(gaussian_blur, width=self.blur), draws.sigmas)
        mean, std = (pixels.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return pixels.sub_(mean).div_(std)


def _change(pixels: Tensor, chosen: Tensor, change: Callable[..., Tensor], *parameters: Tensor) -> None:
    """Change the images that are chosen, in place, each by its own parameters."""
    rows = chosen.nonzero().flatten()
    if len(rows):
        on_device = rows.to(pixels.device)
        pixels[on_device] = change(pixels[on_device], *(values[rows].to(pixels.device) for values in parameters))


def draw_boxes(n: int, height: int, width: int, least_area: float) -> Tensor:
    """Crops `(N, 4)` of images of one size, drawn as torchvision's RandomResizedCrop draws them: top, left, height, width."""
    area = height * width * torch.empty(ATTEMPTS, n).uniform_(least_area, 1)
    ratio = torch.empty(ATTEMPTS, n).uniform_(math.log(RATIO[0]), math.log(RATIO[1])).exp()
    widths, heights = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = fits.byte().argmax(dim=0, keepdim=True)  # the first that fits
    fallback_width, fallback_height = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    found = fits.any(dim=0)
    w = torch.where(found, widths.gather(0, first).squeeze(0), fallback_width)
    h = torch.where(found, heights.gather(0, first).squeeze(0), fallback_height)
    top = torch.where(found, torch.rand(n) * (height - h + 1), (height - h) / 2).floor()
    left = torch.where(found, torch.rand(n) * (width - w + 1), (width - w) / 2).floor()
    return torch.stack([top, left, h, w], dim=1)


@dataclass(frozen=True)
class TorchvisionViews:
    """The same views by torchvision.transforms.v2, image by image: for the workers of a loader, and to compare with."""

    size: int
    strength: float
    blur: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @cached_property
    def transform(self) -> v2.Transform:
        s = self.strength
        steps = [
            v2.RGB(),
            v2.RandomResizedCrop(self.size, (0.08, 1.0), RATIO, antialias=True),
            v2.RandomHorizontalFlip(FLIPPED),
            v2.RandomApply([v2.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)], JITTERED),
            v2.RandomGrayscale(GREYED),
        ]
        if self.blur:
            steps.append(v2.RandomApply([v2.GaussianBlur(self.blur, SIGMA)], BLURRED))
        return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)])

    def __call__(self, images: Tensor) -> Tensor:
        return torch.stack([self.transform(image) for image in images])
