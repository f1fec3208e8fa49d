"""Instances from COCO's files and Cityscapes' polygons: what is read, what is broken, what becomes of it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the examples need the extra `examples`")
pytest.importorskip("faster_coco_eval")
pytest.importorskip("torchmetrics")
pytest.importorskip("rich")

import batches
import cityscapes
import coco_on_the_spot
import segment
import splits
from coco import parts, read_coco
from faster_coco_eval.core.mask import encode
from inputs.images import DataError
from instances import Instance, InstanceSet, Photo, boxes_of, labels_of, masks_of
from PIL import Image

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def float32() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return coco_on_the_spot.make(tmp_path / "coco")


def changed(made: Path, change: Callable[[dict[str, Any]], object], part: str = "train") -> tuple[Path, Path]:
    """The part's folder and its json file, after `change`."""
    folder, file = parts(made)[part]
    contents = json.loads(file.read_text())
    change(contents)
    file.write_text(json.dumps(contents))
    return folder, file


# ------------------------------------------------------------------------------------------------------------ COCO's


def test_coco_instances_are_read_with_boxes_masks_labels_and_crowds(made: Path) -> None:
    found = read_coco(*parts(made)["train"])
    written = json.loads(parts(made)["train"][1].read_text())
    assert found.classes == ("disc", "square", "triangle")
    assert found.groups == ("round", "angular", "angular")
    assert found.problems.counts == {}
    label = {3: 1, 7: 2, 20: 3}
    for photo in found.photos:
        expected = [one for one in written["annotations"] if one["image_id"] == photo.id]
        assert [one.label for one in photo.instances] == [label[each["category_id"]] for each in expected]
        assert [one.area for one in photo.instances] == [each["area"] for each in expected]
        assert [one.crowd for one in photo.instances] == [bool(each["iscrowd"]) for each in expected]
        corners = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (each["bbox"] for each in expected)])
        torch.testing.assert_close(boxes_of(photo.instances), corners)
        assert photo.read().shape == (3, coco_on_the_spot.HEIGHT, coco_on_the_spot.WIDTH)
    assert masks_of(found.photos[0].instances, found.photos[0])[-1].nonzero()[:, 1].min() == 70  # the crowd
    assert len(found.photos[0].told_apart) == 2


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools under numpy 2
def test_masks_are_those_of_pycocotools(made: Path) -> None:
    """Polygons, run lengths in full and packed ones."""
    pycocotools = pytest.importorskip("pycocotools.coco")
    _, file = parts(made)["train"]
    theirs = pycocotools.COCO(str(file))

    def pack(contents: dict[str, Any]) -> None:
        packed = theirs.annToRLE(contents["annotations"][0])
        contents["annotations"][0]["segmentation"] = {"size": packed["size"], "counts": packed["counts"].decode()}

    found = read_coco(*changed(made, pack))
    for photo in found.photos:
        expected = [theirs.annToMask(one) for one in theirs.loadAnns(theirs.getAnnIds([photo.id]))]
        assert np.array_equal(masks_of(photo.instances, photo).numpy(), np.stack(expected))


BROKEN = [
    ({"bbox": [10, 10, 0, 5]}, "with an empty box, or one out of the image"),
    ({"bbox": [300, 10, 5, 5]}, "with an empty box, or one out of the image"),
    ({"bbox": [10, 10, 5]}, "without a box of four numbers"),
    ({"bbox": None}, "without a box of four numbers"),
    ({"bbox": [10, 10, float("nan"), 5]}, "without a box of four numbers"),
    ({"category_id": 4}, "of an unknown category"),
    ({"category_id": [4]}, "of an unknown category"),
    ({"image_id": 99}, "of an image that is not listed"),
    ({"segmentation": []}, "without a mask"),
    ({"segmentation": None}, "without a mask"),
    ({"segmentation": [[1, 2, 3, 4]]}, "with a polygon of fewer than three points"),
    ({"segmentation": [[1, 2, 3, 4, "5", 6]]}, "with a polygon of fewer than three points"),
    ({"segmentation": [[300, 300, 310, 300, 310, 310]]}, "whose mask has no pixel in the image"),
    ({"iscrowd": "no"}, "whose iscrowd is neither 0 nor 1"),
    ({"iscrowd": [0]}, "whose iscrowd is neither 0 nor 1"),
    ({"segmentation": {"size": 5, "counts": [20, 5]}}, "with a mask of another size than their image"),
    ({"segmentation": {"size": [5, 5], "counts": [20, 5]}}, "with a mask of another size than their image"),
    ({"segmentation": {"size": [64, 80], "counts": [20, 5]}}, "with a mask whose run lengths do not fill the image"),
    ({"segmentation": {"size": [64, 80], "counts": "zzzz"}}, "with a mask whose run lengths do not fill the image"),
    ({"segmentation": {"size": [64, 80], "counts": [-1, "a"]}}, "with a mask whose run lengths do not fill the image"),
]


@pytest.mark.parametrize(("change", "kind"), BROKEN)
def test_a_broken_annotation_is_counted_named_and_left_out(made: Path, change: dict[str, Any], kind: str) -> None:
    whole = read_coco(*parts(made)["train"])
    found = read_coco(*changed(made, lambda contents: contents["annotations"][3].update(change)))
    assert found.problems.counts == {f"annotations {kind}: left out": 1}
    assert found.problems.lines() == [f"1 annotations {kind}: left out (4)"]
    assert sum(len(photo.instances) for photo in found.photos) == sum(len(p.instances) for p in whole.photos) - 1
    assert [photo.id for photo in found.photos] == [photo.id for photo in whole.photos]


def test_a_box_is_cut_at_the_edge_of_the_image(made: Path) -> None:
    found = read_coco(*changed(made, lambda contents: contents["annotations"][0].update(bbox=[-5, -5, 300, 20])))
    assert found.photos[0].instances[0].box == (0, 0, 80, 15)


def test_only_the_first_of_many_problems_are_named(made: Path) -> None:
    def change(contents: dict[str, Any]) -> None:
        for one in contents["annotations"][:5]:
            one["bbox"] = []

    found = read_coco(*changed(made, change))
    assert found.problems.lines() == ["5 annotations without a box of four numbers: left out (1, 2, 3, ...)"]


def test_a_missing_image_is_left_out_of_training_and_refused_for_evaluation(made: Path) -> None:
    folder, file = parts(made)["train"]
    (folder / "2.jpg").unlink()
    found = read_coco(folder, file)
    assert [photo.path.name for photo in found.photos] == ["0.jpg", "1.jpg", "3.jpg", "4.jpg", "5.jpg"]
    assert found.problems.lines() == [f"1 images missing in {folder}: left out (2.jpg)"]
    with pytest.raises(DataError, match=re.escape(f"1 images of {file.name} are missing, such as {folder / '2.jpg'}")):
        read_coco(folder, file, skip_missing=False)


def test_images_with_nothing_but_crowds_are_not_trained_on(made: Path) -> None:
    def change(contents: dict[str, Any]) -> None:
        contents["annotations"] = [one for one in contents["annotations"] if one["image_id"] != 100 or one["iscrowd"]]

    found = read_coco(*changed(made, change))
    assert [photo.id for photo in found.photos] == [100, 101, 102, 103, 104, 105]
    assert [photo.id for photo in batches.trainable(found.photos)] == [101, 102, 103, 104, 105]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.pop("images"),
            "is not written like COCO's: it must hold the lists images, annotations, categories",
        ),
        (lambda c: c["images"].append(c["images"][0]), "two images have the id 100"),
        (lambda c: c["categories"].append(c["categories"][0]), "two categories have the same id"),
        (
            lambda c: c["categories"].append({"id": "5", "name": "more"}),
            "ids of categories must all be whole numbers, or all be text; there are 3 and '5'",
        ),
        (
            lambda c: c["categories"].append({"id": [5], "name": "more"}),
            r"ids of categories must all be whole numbers, or all be text; there are 3 and \[5\]",
        ),
        (lambda c: c["categories"].append({"id": 5}), "every category must have an id and a name"),
        (lambda c: c["annotations"].clear(), "no image of .* is left that has an instance"),
    ],
)
def test_a_file_that_says_nothing_sure_is_refused(
    made: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_coco(*changed(made, change))


@pytest.mark.parametrize(("said", "crowd"), [("0", False), ("1", True), (None, False), (True, True)])
def test_a_crowd_is_what_says_so_in_whatever_type(made: Path, said: object, crowd: bool) -> None:
    found = read_coco(*changed(made, lambda contents: contents["annotations"][0].update(iscrowd=said)))
    assert found.photos[0].instances[0].crowd == crowd


@pytest.mark.parametrize("change", [{"id": [7]}, {"file_name": None}, {"file_name": 7}, {"height": "64"}])
def test_images_whose_entries_are_of_other_types_are_left_out(made: Path, change: dict[str, Any]) -> None:
    found = read_coco(*changed(made, lambda contents: contents["images"][1].update(change)))
    assert found.problems.counts["images listed without file_name, height, id, width: left out"] == 1
    assert len(found.photos) == 5


def test_images_listed_by_halves_are_left_out(made: Path) -> None:
    found = read_coco(*changed(made, lambda contents: contents["images"][1].pop("width")))
    assert found.problems.counts == {"images listed without file_name, height, id, width: left out": 1}
    assert len(found.photos) == 5


def test_merged_classes_are_the_groups_or_one(made: Path) -> None:
    found = read_coco(*parts(made)["train"])
    labels = torch.cat([labels_of(photo.instances) for photo in found.photos])
    groups, one = found.merged("group"), found.merged("all")
    assert groups.classes == ("round", "angular")
    assert one.classes == ("object",)
    assert torch.equal(torch.cat([labels_of(p.instances) for p in groups.photos]), (labels > 1).long() + 1)
    assert torch.equal(torch.cat([labels_of(p.instances) for p in one.photos]), torch.ones_like(labels))
    assert found.merged("none") is found


# ------------------------------------------------------------------------------------------------------------ batches


def test_mirrored_images_keep_their_boxes_around_their_masks(made: Path) -> None:
    photos = batches.trainable(read_coco(*parts(made)["train"]).photos)
    drawn = [(seed, torch.tensor([1])) for seed in range(6)]
    seen = set()
    for images, targets in batches.training_batches(photos, drawn, CPU, workers=0):
        plain = photos[1].read() / 255
        mirrored = not torch.equal(images[0], plain)
        seen.add(mirrored)
        assert torch.equal(images[0].flip(2) if mirrored else images[0], plain)
        for box, mask in zip(targets[0]["boxes"], targets[0]["masks"], strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            around = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            torch.testing.assert_close(box, around.float(), atol=1.5, rtol=0)
    assert seen == {True, False}


def test_an_image_that_breaks_in_the_middle_of_an_epoch_is_named_and_replaced(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = read_coco(*parts(made)["train"])
    found.photos[1].path.write_bytes(found.photos[1].path.read_bytes()[:300])
    Image.new("RGB", (8, 8)).save(found.photos[2].path)
    ((images, _),) = batches.training_batches(found.photos, [(0, torch.tensor([1]))], CPU, workers=0)
    other = found.photos[3].read() / 255
    assert torch.equal(images[0], other) or torch.equal(images[0], other.flip(2))
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"warning: .*1\.jpg is no image that can be read .*; another image is taken", first)
    assert re.fullmatch(r"warning: .*2\.jpg has 8 x 8 pixels, its annotations are for 80 x 64; another .*", second)

    detected = [image is None for _, image in batches.images_to_detect(found, CPU, workers=0)]
    assert detected == [False, True, True, False, False, False]


# ------------------------------------------------------------------------------------------------------------- splits


def test_splits_follow_from_their_seed_alone_and_the_smaller_is_part_of_the_larger(made: Path, tmp_path: Path) -> None:
    def lists(out: Path) -> dict[str, list[int]]:
        argv = ["--data", str(made), "--sizes", "4", "2", "--out", str(out)]
        assert splits.main(argv) == 0
        return {file.stem: json.loads(file.read_text())["images"] for file in out.iterdir()}

    first = lists(tmp_path / "one")
    changed(made, lambda contents: random.Random(0).shuffle(contents["images"]))
    assert lists(tmp_path / "other") == first
    assert sorted(first) == [f"COCO-{size}-seed{seed}" for size in (2, 4) for seed in range(5)]
    assert len({tuple(first[f"COCO-4-seed{seed}"]) for seed in range(5)}) > 1
    for seed in range(5):
        small, large = (set(first[f"COCO-{size}-seed{seed}"]) for size in (2, 4))
        assert len(small) == 2
        assert len(large) == 4
        assert small < large
    only = first["COCO-4-seed0"]
    assert [photo.id for photo in read_coco(*parts(made)["train"], only).photos] == only


def test_a_split_of_ids_of_several_types_is_one_line(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(made, lambda contents: contents["images"][1].update(id="101"))
    with pytest.raises(SystemExit):
        splits.main(["--data", str(made), "--sizes", "2", "--out", str(tmp_path)])
    line = "the ids of images must all be whole numbers, or all be text; there are 100 and '101'"
    assert capsys.readouterr().err.endswith(f"{line}\n")


def test_the_papers_splits_have_its_names() -> None:
    assert [splits.name_of(size) for size in (10_000, 1_000, 50)] == ["COCO-10K", "COCO-1K", "COCO-50"]


def test_a_split_larger_than_the_set_is_one_line(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        splits.main(["--data", str(made), "--sizes", "7", "--out", str(tmp_path)])
    assert capsys.readouterr().err == "error: there are 6 images, too few for a subset of 7\n"


# --------------------------------------------------------------------------------------------------------- Cityscapes


def square(x: int, y: int, side: int) -> list[list[int]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side]]


@pytest.fixture
def city(tmp_path: Path) -> Path:
    """One image of Aachen, 60 x 40, in Cityscapes' layout."""
    objects = [
        {"label": "road", "polygon": square(0, 0, 60)},
        {"label": "car", "polygon": square(5, 5, 9)},  # its lower right quarter is hidden by the next
        {"label": "person", "polygon": square(10, 10, 9)},
        {"label": "cargroup", "polygon": square(30, 5, 9)},
        {"label": "bicycle", "polygon": square(45, 20, 9)},  # hidden by the wall
        {"label": "wall", "polygon": square(44, 19, 12)},
        {"label": "license plate", "polygon": square(5, 5, 2)},  # never painted
        {"label": "truck", "polygon": square(30, 25, 9), "deleted": 1},
    ]
    write_city(tmp_path, "train", "aachen_000000_000019", objects)
    return tmp_path


def write_city(root: Path, part: str, name: str, objects: list[dict[str, Any]]) -> None:
    polygons, pixels = root / "gtFine" / part / "aachen", root / "leftImg8bit" / part / "aachen"
    polygons.mkdir(parents=True, exist_ok=True)
    pixels.mkdir(parents=True, exist_ok=True)
    contents = {"imgHeight": 40, "imgWidth": 60, "objects": objects}
    (polygons / f"{name}_gtFine_polygons.json").write_text(json.dumps(contents))
    Image.new("RGB", (60, 40)).save(pixels / f"{name}_leftImg8bit.png")


def test_cityscapes_polygons_become_the_visible_parts_of_its_eight_classes(city: Path) -> None:
    found = cityscapes.read_cityscapes(city, "train")
    assert found.classes == ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
    (photo,) = found.photos
    car, person, group = photo.instances
    assert [found.classes[one.label - 1] for one in photo.instances] == ["car", "person", "car"]
    assert [one.crowd for one in photo.instances] == [False, False, True]
    assert (
        person.area == 100
    )  # pixels 10..19 in both directions: Pillow's polygons, as Cityscapes' own, have their edge
    assert person.box == (10, 10, 20, 20)
    assert car.area == 100 - 25
    assert car.box == (5, 5, 15, 15)
    masks = masks_of(photo.instances, photo)
    assert masks.sum(dim=0).max() == 1  # no pixel belongs to two
    assert masks[0, 5:15, 5:15].sum() == 75
    assert masks[0, 10:15, 10:15].sum() == 0
    assert group.area == 100
    assert found.problems.lines() == [
        "1 instances that are hidden or out of the image: left out (bicycle of aachen_000000_000019)"
    ]


def test_what_is_broken_in_cityscapes_is_counted_and_named(city: Path) -> None:
    objects = [
        {"label": "car", "polygon": square(5, 5, 9)},
        {"label": "car", "polygon": [[1, 1], [2, 2]]},
        {"label": "car"},
        {"label": "spaceship", "polygon": square(20, 5, 9)},
        {"label": "bus", "polygon": square(200, 200, 9)},
    ]
    write_city(city, "train", "b", objects)
    write_city(city, "train", "c", objects)
    write_city(city, "train", "d", objects)
    (city / "leftImg8bit/train/aachen/c_leftImg8bit.png").unlink()
    (city / "gtFine/train/aachen/d_gtFine_polygons.json").write_text("{")
    found = cityscapes.read_cityscapes(city, "train")
    assert [len(photo.instances) for photo in found.photos] == [3, 1]
    assert found.problems.counts == {
        "instances that are hidden or out of the image: left out": 2,
        "polygons of fewer than three points: left out": 1,
        "polygons that cannot be read: left out": 1,
        "polygons of an unknown label: taken as background": 1,
        "images missing: left out": 1,
        "files of polygons that cannot be read: their images are left out": 1,
    }
    with pytest.raises(DataError, match=r"c_leftImg8bit\.png is missing"):
        cityscapes.read_cityscapes(city, "train", skip_missing=False)
    with pytest.raises(DataError, match="is not laid out as Cityscapes is"):
        cityscapes.read_cityscapes(city, "val")


# ------------------------------------------------------------------------------------------------- maps of classes


def test_in_a_map_of_classes_small_objects_are_in_front_and_crowds_do_not_count(tmp_path: Path) -> None:
    def block(label: int, side: int, crowd: bool = False) -> Instance:
        mask = np.zeros((6, 6), dtype=np.uint8, order="F")
        mask[:side, :side] = 1
        return Instance((0, 0, side, side), label, encode(mask), side**2, crowd)

    photo = Photo(1, tmp_path / "none.jpg", 6, 6, (block(2, 2), block(1, 4), block(3, 5, crowd=True)))
    expected = torch.zeros(6, 6, dtype=torch.uint8)
    expected[:5, :5], expected[:4, :4], expected[:2, :2] = 255, 1, 2
    assert torch.equal(segment.class_map(photo), expected)


def test_intersection_over_union_is_the_mean_over_the_classes_that_are_there() -> None:
    confusion = torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    assert segment.intersection_over_union(confusion) == pytest.approx((6 / 9 + 3 / 6) / 2)


def test_a_set_is_told_by_its_parts(made: Path) -> None:
    assert isinstance(read_coco(*parts(made)["val"]), InstanceSet)
    (made / "annotations/instances_val2014.json").write_text("{}")
    with pytest.raises(DataError, match=r"it has 2 files annotations/instances_val\*\.json, not one"):
        parts(made)
