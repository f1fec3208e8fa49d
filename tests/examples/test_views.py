"""The random views: each change against torchvision's on single images, what chance decides, and how often."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn", reason="the examples need the extra `examples`")

from inputs import batch_transforms, simclr, views
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference


@pytest.fixture(autouse=True)
def float32() -> Iterator[None]:
    torch.set_default_dtype(torch.float32)
    return


def random_images(n: int = 6, height: int = 17, width: int = 23) -> Tensor:
    """Float64 images with grey, black, white and primary pixels among them, where hue is easily wrong."""
    images = torch.rand(n, 3, height, width, dtype=torch.float64)
    images[:, :, 0, :8] = torch.tensor(
        [[0, 1, 1, 0, 0, 0.5, 1, 1], [0, 1, 0, 1, 0, 0.5, 1, 0], [0, 1, 0, 0, 1, 0.5, 0, 1]]
    )
    return images


# ------------------------------------------------------------------------------------- each change against torchvision


@pytest.mark.parametrize(
    ("change", "single", "factors"),
    [
        (batch_transforms.brightness, reference.adjust_brightness, [0.0, 0.3, 0.9, 1.0, 1.4, 1.8]),
        (batch_transforms.contrast, reference.adjust_contrast, [0.0, 0.3, 0.9, 1.0, 1.4, 1.8]),
        (batch_transforms.saturation, reference.adjust_saturation, [0.0, 0.3, 0.9, 1.0, 1.4, 1.8]),
        (batch_transforms.hue, reference.adjust_hue, [-0.5, -0.2, 0.0, 0.07, 0.2, 0.5]),
    ],
    ids=["brightness", "contrast", "saturation", "hue"],
)
def test_colours_change_as_torchvision_changes_them_image_by_image(
    change: Callable[[Tensor, Tensor], Tensor], single: Callable[[Tensor, float], Tensor], factors: list[float]
) -> None:
    images = random_images()
    before = images.clone()
    expected = torch.stack([single(image, factor) for image, factor in zip(images, factors, strict=True)])
    torch.testing.assert_close(change(images, torch.tensor(factors, dtype=torch.float64)), expected, atol=1e-6, rtol=0)
    assert torch.equal(images, before)


def test_grey_is_torchvisions() -> None:
    images = random_images()
    torch.testing.assert_close(batch_transforms.grey(images), reference.rgb_to_grayscale(images), atol=1e-6, rtol=0)


@pytest.mark.parametrize("width", [3, 9])
def test_blur_is_torchvisions_with_a_sigma_for_each_image(width: int) -> None:
    images, sigmas = random_images(), [0.1, 0.5, 1.0, 1.5, 1.9, 2.0]
    expected = torch.stack(
        [reference.gaussian_blur(x, [width] * 2, [s] * 2) for x, s in zip(images, sigmas, strict=True)]
    )
    found = batch_transforms.gaussian_blur(images, torch.tensor(sigmas), width)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_crops_are_torchvisions_with_a_box_for_each_image() -> None:
    images = random_images()
    boxes = [(0, 0, 17, 23), (3, 4, 10, 5), (0, 0, 1, 1), (16, 22, 1, 1), (5, 0, 12, 23), (2, 9, 7, 14)]
    flipped = [False, True, False, True, True, False]
    found = batch_transforms.resized_crop(images, torch.tensor(boxes), torch.tensor(flipped), size=24)
    for image, box, flip, crop in zip(images, boxes, flipped, found, strict=True):
        expected = reference.resized_crop(image, *box, [24, 24], antialias=True)
        expected = reference.horizontal_flip(expected) if flip else expected
        torch.testing.assert_close(crop, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [32, 96])
def test_a_view_is_torchvisions_steps_with_the_same_draws(size: int) -> None:
    """The whole chain, image by image, in each image's own order of colour changes."""
    images = torch.randint(0, 256, (24, 3, size, size), dtype=torch.uint8)
    view = views.simclr_views(size)
    torch.manual_seed(3)
    found = view(images)
    torch.manual_seed(3)
    boxes, draws = simclr.draw_boxes(24, size, size, 0.08), view.draw(24)
    changes = (
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
        reference.adjust_hue,
    )
    for n, image in enumerate(images):
        x = reference.resized_crop(image / 255, *boxes[n].int().tolist(), [size, size], antialias=True)
        x = reference.horizontal_flip(x) if draws.flipped[n] else x
        for kind in draws.order[n].tolist() if draws.jittered[n] else []:
            x = changes[kind](x, float(draws.factors[n, kind]))
        x = reference.rgb_to_grayscale(x, 3) if draws.greyed[n] else x
        if draws.blurred[n]:
            x = reference.gaussian_blur(x, [view.blur] * 2, [float(draws.sigmas[n])] * 2)
        torch.testing.assert_close(found[n], 2 * x - 1, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------ what chance decides


def test_boxes_are_drawn_as_torchvision_draws_them() -> None:
    """Mean and spread of place and shape, of many boxes of an image that is not square."""
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(8, (0.08, 1.0))
    image = torch.empty(3, 30, 50)
    expected = [crop.make_params([image]) for _ in range(4000)]
    expected = torch.tensor([[box[side] for side in ("top", "left", "height", "width")] for box in expected]).float()
    found = simclr.draw_boxes(4000, 30, 50, 0.08)
    assert torch.equal(found, found.round())
    assert (found >= 0).all()
    assert (found[:, 0] + found[:, 2] <= 30).all()
    assert (found[:, 1] + found[:, 3] <= 50).all()
    error = expected.std(0) * (2 / 4000) ** 0.5
    assert ((found.mean(0) - expected.mean(0)).abs() < 4 * error).all()
    torch.testing.assert_close(found.std(0), expected.std(0), rtol=0.1, atol=0)


def test_an_image_that_no_crop_fits_is_cut_in_its_middle() -> None:
    """One by ninety: torchvision falls back to the widest ratio that it allows."""
    crop = v2.RandomResizedCrop(8, (0.9, 1.0)).make_params([torch.empty(3, 9, 900)])
    expected = [crop[side] for side in ("top", "left", "height", "width")]
    assert simclr.draw_boxes(1, 9, 900, 0.9).tolist() == [expected]


def test_draws_keep_to_simclrs_frequencies_and_ranges() -> None:
    torch.manual_seed(0)
    draws = views.simclr_views(224).draw(20_000)
    for share, expected in (("flipped", 0.5), ("jittered", 0.8), ("greyed", 0.2), ("blurred", 0.5)):
        assert float(getattr(draws, share).float().mean()) == pytest.approx(expected, abs=0.015), share
    low, high = draws.factors.aminmax(dim=0)
    torch.testing.assert_close(low, torch.tensor([0.2, 0.2, 0.2, -0.2]), atol=1e-3, rtol=0)
    torch.testing.assert_close(high, torch.tensor([1.8, 1.8, 1.8, 0.2]), atol=1e-3, rtol=0)
    orders = draws.order.unique(dim=0, return_counts=True)
    assert len(orders[0]) == 24
    assert orders[1].min() > 20_000 / 24 * 0.8
    assert 0.1 <= draws.sigmas.min() < draws.sigmas.max() <= 2


def test_settings_follow_the_size() -> None:
    """CIFAR-10's up to 64 pixels: half the colour, no blur; ImageNet's kernel is 23 pixels of 224."""
    assert [(v.strength, v.blur) for v in map(views.simclr_views, (32, 64, 96, 224))] == [
        (0.5, 0),
        (0.5, 0),
        (1, 9),
        (1, 23),
    ]
    assert [(v.strength, v.blur) for v in map(views.torchvision_views, (32, 96))] == [(0.5, 0), (1, 9)]


@pytest.mark.parametrize("size", [32, 96])
def test_batches_and_single_images_are_changed_alike_on_average(size: int) -> None:
    """Mean and deviation of many views of one image, by pixel colour: batch path against torchvision's transforms."""
    torch.manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 6, 6), dtype=torch.uint8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    many = image.expand(600, -1, -1, -1)
    batch, single = views.simclr_views(size)(many), views.torchvision_views(size)(many)
    assert batch.shape == single.shape == (600, 3, size, size)
    for measure in (lambda x: x.mean((2, 3)), lambda x: x.std((2, 3))):
        one, other = measure(batch), measure(single)
        assert ((one.mean(0) - other.mean(0)).abs() < 4 * one.std(0) * (2 / 600) ** 0.5).all()


def test_a_seed_gives_the_same_views_and_leaves_the_images_as_they_are() -> None:
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    before, view = images.clone(), views.simclr_views(32)
    torch.manual_seed(1)
    one = view(images)
    torch.manual_seed(1)
    assert torch.equal(view(images), one)
    assert not torch.equal(view(images), one)
    assert torch.equal(images, before)


@pytest.mark.parametrize("make", [views.grey_views, views.simclr_views(8)], ids=["grey", "simclr"])
def test_each_image_of_a_batch_gets_a_view_of_its_own(make: views.Views) -> None:
    channels = 1 if make is views.grey_views else 3
    batch = torch.randint(0, 256, (1, channels, 8, 8), dtype=torch.uint8).expand(6, -1, -1, -1)
    torch.manual_seed(0)
    seen = make(batch)
    assert seen.shape == batch.shape
    assert seen.dtype == torch.float32
    assert -1 <= seen.min() < seen.max() <= 1 + 1e-6
    assert len({tuple(view.flatten().tolist()) for view in seen}) == 6
    torch.manual_seed(0)
    assert torch.equal(make(batch), seen)


def test_grey_images_become_rgb_in_simclrs_views() -> None:
    assert views.simclr_views(8)(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape == (2, 3, 8, 8)
    assert views.torchvision_views(8)(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape == (2, 3, 8, 8)


def test_crop_views_only_crop_and_flip() -> None:
    """An image of one colour stays as it is."""
    red = torch.tensor([200, 30, 60], dtype=torch.uint8).view(1, 3, 1, 1).expand(50, 3, 32, 32)
    torch.testing.assert_close(views.crop_views(32)(red), views.scaled(red))
    left = torch.arange(32, dtype=torch.uint8).expand(50, 3, 32, 32)
    mirrored = (views.crop_views(32)(left).diff(dim=3).sum((1, 2, 3)) < 0).float().mean()
    assert 0.2 < mirrored < 0.8


def test_views_for_other_statistics_are_normalised_by_them() -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    torch.manual_seed(0)
    plain = (views.simclr_views(32)(images) + 1) / 2
    torch.manual_seed(0)
    found = replace(views.simclr_views(32), mean=mean, std=std)(images)
    torch.testing.assert_close(found, reference.normalize(plain, mean, std))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_seed_gives_the_same_views_on_a_gpu() -> None:
    images = torch.randint(0, 256, (16, 3, 96, 96), dtype=torch.uint8)
    torch.manual_seed(1)
    one = views.simclr_views(96)(images)
    torch.manual_seed(1)
    torch.testing.assert_close(views.simclr_views(96)(images.cuda()).cpu(), one, atol=1e-3, rtol=0)


def test_batches_may_be_so_small_that_nothing_is_blurred_or_grey() -> None:
    image = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8)
    torch.manual_seed(0)
    assert all(views.simclr_views(96)(image).isfinite().all() for _ in range(20))


# ----------------------------------------------------------------------------------------------------------- grey views


def test_handwriting_is_not_flipped() -> None:
    lit_left = torch.zeros(400, 1, 8, 8, dtype=torch.uint8)
    lit_left[..., :4] = 255
    torch.manual_seed(0)
    seen = views.grey_views(lit_left)
    assert float((seen[..., :4] - seen[..., 4:]).mean()) > 1


def test_the_grey_views_change_the_picture_by_what_they_say() -> None:
    """Moved by at most 12 % of its side and enlarged by at most 1.15, a dot in the middle stays near it."""
    dot = torch.zeros(200, 1, 41, 41, dtype=torch.uint8)
    dot[..., 19:22, 19:22] = 255
    torch.manual_seed(0)
    place = (views.grey_views(dot).squeeze(1) > 0).nonzero()[:, 1:].float() - 20
    assert 3 < place.abs().max() < 41 * 0.12 * 1.5 + 3


# ------------------------------------------------------------------------------------------------ shifts, to learn labels from


def test_a_shifted_view_is_a_window_of_the_reflected_image_or_of_its_mirror_image() -> None:
    images = torch.randint(256, (40, 3, 7, 9), dtype=torch.uint8)
    shifted = views.shifted_views(images, by=2)
    assert shifted.shape == images.shape
    padded = torch.nn.functional.pad(views.scaled(images), [2] * 4, mode="reflect")
    seen = set()
    for image, view in zip(padded, shifted, strict=True):
        windows = {
            (down, right, mirrored): window.flip(2) if mirrored else window
            for down in range(5)
            for right in range(5)
            for window in [image[:, down : down + 7, right : right + 9]]
            for mirrored in (False, True)
        }
        found = [place for place, window in windows.items() if torch.equal(window, view)]
        assert len(found) == 1
        seen.add(found[0])
    assert {place[0] for place in seen} == {place[1] for place in seen} == set(range(5))
    assert {place[2] for place in seen} == {False, True}
