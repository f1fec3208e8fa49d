"""Batches: the same views of a step whatever came before, from memory and from files, and plain images in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the examples need the extra `examples`")

from inputs import loading, views
from inputs.image_sets import DataError, Folder, Images
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

CPU = torch.device("cpu")
STEPS = [(7, torch.tensor([0, 3, 1])), (8, torch.tensor([2, 2, 4])), (9, torch.tensor([5, 0, 1]))]


@pytest.fixture(autouse=True)
def float32() -> Iterator[None]:
    torch.set_default_dtype(torch.float32)
    return


@pytest.fixture
def in_memory() -> Images:
    pixels = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(9) % 3
    return Images("noise", pixels[:6], labels[:6], pixels[6:], labels[6:])


@pytest.fixture
def in_files(tmp_path: Path) -> Folder:
    """Six images of several sizes to train on, three held out; seen at 16 pixels."""
    paths = [str(tmp_path / f"{i}.png") for i in range(9)]
    for i, path in enumerate(paths):
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 40 - i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    labels = torch.arange(9) % 3
    return Folder("noise", 16, paths[:6], labels[:6], paths[6:], labels[6:])


def listed(batches: Iterator[tuple[list[Tensor], Tensor]]) -> list[Tensor]:
    return [tensor for seen, labels in batches for tensor in (*seen, labels)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


WAYS = [
    pytest.param("in_memory", views.simclr_views(16), {}, id="memory"),
    pytest.param("in_memory", views.torchvision_views(16), {}, id="memory, torchvision"),
    pytest.param("in_files", views.simclr_views(16), {}, id="files, finished on the device"),
    pytest.param("in_files", views.simclr_views(16), {"augment_on": "worker"}, id="files, by workers"),
    pytest.param("in_files", views.torchvision_views(16), {"augment_on": "worker"}, id="files, torchvision"),
]


@pytest.mark.parametrize(("source", "view", "options"), WAYS)
def test_a_step_has_the_same_views_whatever_came_before(
    source: str, view: views.Views, options: dict[str, str], request: pytest.FixtureRequest
) -> None:
    images = request.getfixturevalue(source)
    whole = listed(loading.view_batches(images, STEPS, view, CPU, **options))
    torch.rand(5)
    resumed = listed(loading.view_batches(images, STEPS[1:], view, CPU, **options))
    assert len(whole) == 9
    assert same(whole[3:], resumed)
    assert [t.shape for t in whole[:2]] == [(3, 3, 16, 16)] * 2
    assert whole[2].tolist() == [0, 0, 1]
    assert not torch.equal(whole[0], whole[1])  # two views of the same images
    assert all(-1.001 <= pixels.min() < pixels.max() <= 1.001 for pixels in whole[:2])


@pytest.mark.parametrize(("source", "view", "options"), WAYS)
def test_loading_leaves_the_callers_random_numbers_alone(
    source: str, view: views.Views, options: dict[str, str], request: pytest.FixtureRequest
) -> None:
    images = request.getfixturevalue(source)
    state = torch.get_rng_state()
    listed(loading.view_batches(images, STEPS, view, CPU, **options))
    listed(([x], y) for x, y in loading.plain_batches(images, "train", 4, CPU))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("source", ["in_memory", "in_files"])
@pytest.mark.parametrize("augment_on", ["device", "worker"])
def test_worker_processes_make_the_same_views(source: str, augment_on: str, request: pytest.FixtureRequest) -> None:
    images = request.getfixturevalue(source)
    make = partial(loading.view_batches, images, STEPS, views.simclr_views(16), CPU, augment_on=augment_on)
    assert same(listed(make(workers=2)), listed(make()))


def test_memory_gives_the_same_views_on_the_device_and_by_workers(in_memory: Images) -> None:
    make = partial(loading.view_batches, in_memory, STEPS, views.simclr_views(16), CPU)
    assert same(listed(make(augment_on="worker")), listed(make()))


def test_there_are_as_many_views_as_asked_for(in_memory: Images) -> None:
    for seen, labels in loading.view_batches(in_memory, STEPS, views.simclr_views(16), CPU, views=3):
        assert (len(seen), len(labels)) == (3, 3)


def test_crops_of_files_are_cut_from_all_of_the_image(tmp_path: Path) -> None:
    """Of an image with a red left and a blue right end, far from its middle, some crops show each."""
    pixels = np.zeros((20, 200, 3), dtype=np.uint8)
    pixels[:, :20, 0] = pixels[:, -20:, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    labels = torch.zeros(1, dtype=torch.long)
    images = Folder("wide", 16, [str(tmp_path / "wide.png")], labels, [str(tmp_path / "wide.png")], labels)
    ((seen, _),) = loading.view_batches(images, [(0, torch.zeros(200, dtype=torch.long))], views.crop_views(16), CPU)
    red, _, blue = (seen[0].amax((2, 3)) > 0.9).float().mean(0).tolist()
    assert 0.02 < red < 0.5
    assert 0.02 < blue < 0.5


@pytest.mark.parametrize("source", ["in_memory", "in_files"])
def test_plain_batches_come_in_order_and_normalised(source: str, request: pytest.FixtureRequest) -> None:
    images = request.getfixturevalue(source)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    for part, count in (("train", 6), ("test", 3)):
        batches = list(loading.plain_batches(images, part, 4, CPU, mean, std))
        labels = torch.cat([labels for _, labels in batches])
        assert labels.tolist() == getattr(images, f"{part}_labels").tolist()
        for i, pixels in enumerate(torch.cat([pixels for pixels, _ in batches])):
            if isinstance(images, Images):
                expected = getattr(images, part)[i]
            else:
                expected = reference.center_crop(reference.resize(images.read(part, i), [18]), [16])
            torch.testing.assert_close(pixels, reference.normalize(expected / 255, mean, std))
        assert len(labels) == count


def test_pixels_are_between_minus_one_and_one_by_default(in_memory: Images) -> None:
    ((pixels, _),) = loading.plain_batches(in_memory, "train", 6, CPU)
    torch.testing.assert_close(pixels, views.scaled(in_memory.train))


def test_grey_images_are_repeated_for_the_backbone(in_memory: Images) -> None:
    grey = replace(in_memory, train=in_memory.train[:, :1], test=in_memory.test[:, :1])
    batches = [next(loading.view_batches(grey, STEPS, views.grey_views, CPU))[0][0]]
    batches.append(next(loading.view_batches(grey, STEPS, views.grey_views, CPU, augment_on="worker"))[0][0])
    batches.append(next(loading.plain_batches(grey, "test", 3, CPU))[0])
    for pixels in batches:
        assert pixels.shape == (3, 3, 16, 16)
        assert torch.equal(pixels[:, 0], pixels[:, 2])


def test_a_file_that_is_no_image_is_named(in_files: Folder) -> None:
    Path(in_files.test_paths[1]).write_text("no image")
    with pytest.raises(DataError, match=r"7.png is no image that can be read"):
        list(loading.plain_batches(in_files, "test", 3, CPU))


def test_of_what_is_wrong_in_a_worker_nothing_but_the_line_comes_back(in_files: Folder) -> None:
    Path(in_files.test_paths[1]).write_text("no image")
    messages = []
    for workers in (0, 2):
        with pytest.raises(DataError) as refused:
            list(loading.plain_batches(in_files, "test", 3, CPU, workers=workers))
        messages.append(str(refused.value))
    assert messages[0] == messages[1]
