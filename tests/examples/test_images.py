"""The data sets in every layout, made on the spot: what comes out is what was written, and what is wrong is one line."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the examples need the extra `examples`")
pytest.importorskip("tqdm")

import knn_eval
import pretrain
from inputs import image_folders, images
from PIL import ExifTags, Image
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.v2 import functional


@pytest.fixture(autouse=True)
def float32() -> Iterator[None]:
    torch.set_default_dtype(torch.float32)
    return


def pixels(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which this machine publishes it."""
    (tmp_path / "served").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield tmp_path / "served", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def refusal(name: str, *args: Any, **kwargs: Any) -> str:
    """The line that a data set is refused with."""
    with pytest.raises(images.DataError) as refused:
        images.load(name, *args, **kwargs)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def write_cifar(root: Path, folder: str, parts: dict[str, tuple[np.ndarray[Any, Any], list[int]]], key: str) -> None:
    (root / folder).mkdir()
    for name, (data, labels) in parts.items():
        rows = data.transpose(0, 3, 1, 2).reshape(len(data), -1)
        (root / folder / name).write_bytes(pickle.dumps({"data": rows, key: labels}))


def accept(monkeypatch: pytest.MonkeyPatch, dataset: type, folder: Path) -> None:
    """Put the md5 sums of the files made here in the place of the published ones."""

    def of(name: str) -> str:
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for files in ("train_list", "test_list"):
        present = [name for name, _ in getattr(dataset, files) if (folder / name).exists()]
        monkeypatch.setattr(dataset, files, [[name, of(name)] for name in present])
    if hasattr(dataset, "meta"):
        monkeypatch.setattr(dataset, "meta", dataset.meta | {"md5": of(dataset.meta["filename"])})


def make_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[int]]:
    x, y = pixels(10, 32, 32, 3), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    parts = {f"data_batch_{i + 1}": (x[2 * i : 2 * i + 2], y[2 * i : 2 * i + 2]) for i in range(5)}
    write_cifar(root, "cifar-10-batches-py", {**parts, "test_batch": (x[:3], y[:3])}, "labels")
    (root / "cifar-10-batches-py/batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    accept(monkeypatch, datasets.CIFAR10, root / "cifar-10-batches-py")
    return torch.from_numpy(x).permute(0, 3, 1, 2), y


def make_cifar100(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[int]]:
    x, y = pixels(6, 32, 32, 3), [0, 99, 3, 50, 7, 98]
    write_cifar(root, "cifar-100-python", {"train": (x, y), "test": (x[:3], y[:3])}, "fine_labels")
    (root / "cifar-100-python/meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    accept(monkeypatch, datasets.CIFAR100, root / "cifar-100-python")
    return torch.from_numpy(x).permute(0, 3, 1, 2), y


def make_fashion_mnist(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[int]]:
    x, y = pixels(5, 28, 28), [4, 3, 2, 1, 0]
    raw = root / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 5), ("t10k", 3)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, n, 28, 28) + x[:n].tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, n) + bytes(y[:n]))
    return torch.from_numpy(x).unsqueeze(1), y


def make_stl10(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[int]]:
    x, y = pixels(5, 3, 96, 96), [0, 9, 4, 1, 2]
    folder = root / "stl10_binary"
    folder.mkdir()
    for part, n in (("train", 5), ("test", 3)):
        (folder / f"{part}_X.bin").write_bytes(x[:n].transpose(0, 1, 3, 2).tobytes())  # column by column
        (folder / f"{part}_y.bin").write_bytes(bytes(label + 1 for label in y[:n]))
    for name in ("class_names.txt", "fold_indices.txt", "unlabeled_X.bin"):
        (folder / name).write_text("a\n")
    accept(monkeypatch, datasets.STL10, folder)
    return torch.from_numpy(x), y


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("cifar10", make_cifar10),
        ("cifar100", make_cifar100),
        ("fashion-mnist", make_fashion_mnist),
        ("stl10", make_stl10),
    ],
)
def test_torchvision_data_sets_come_as_they_were_written(
    name: str,
    make: Callable[[Path, pytest.MonkeyPatch], tuple[Tensor, list[int]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = make(tmp_path, monkeypatch)
    loaded = images.load(name, tmp_path)
    assert torch.equal(loaded.train, x)
    assert torch.equal(loaded.test, x[:3])
    assert loaded.train_labels.tolist() == y
    assert loaded.test_labels.tolist() == y[:3]
    assert images.load(name, tmp_path, size=20).train.shape == (len(x), x.shape[1], 20, 20)


def test_the_digits_are_scikit_learns_and_those_held_out_are_by_other_writers() -> None:
    digits = images.load("digits")
    original = images.load_digits()
    assert torch.equal(digits.train[:, 0], torch.from_numpy(original.images[:1287] * (255 / 16)).round().byte())
    assert (len(digits.train), len(digits.test), digits.classes, digits.channels, digits.size) == (1287, 510, 10, 1, 8)
    # each writer begins with 0 1 2 ... 9 0 1 2 ... 9
    assert digits.test_labels[:20].tolist() == [*range(10)] * 2
    assert images.load("digits", size=32).train.shape == (1287, 1, 32, 32)


def write_pngs(folder: Path, count: int, shade: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (20 + i, 30), (shade, shade, shade)).save(folder / f"{i}.png")


def test_image_folders_with_train_and_val_are_taken_as_they_are(tmp_path: Path) -> None:
    for part, count in (("train", 4), ("val", 2)):
        write_pngs(tmp_path / part / "dark", count, 10)
        write_pngs(tmp_path / part / "light", count, 200)
    loaded = images.load(f"imagefolder:{tmp_path}", size=16)
    assert loaded.train.shape == (8, 3, 16, 16)
    assert loaded.train.unique().tolist() == [10, 200]
    assert loaded.train_labels.tolist() == [0] * 4 + [1] * 4
    assert loaded.test_labels.tolist() == [0, 0, 1, 1]


def test_every_fifth_image_of_a_plain_folder_is_held_out(tmp_path: Path) -> None:
    write_pngs(tmp_path / "dark", 5, 10)
    write_pngs(tmp_path / "light", 10, 200)
    loaded = images.load(f"imagefolder:{tmp_path}")
    assert loaded.train.shape == (12, 3, 64, 64)
    assert loaded.test_labels.tolist() == [0, 1, 1]
    assert loaded.test.amax(dim=(1, 2, 3)).tolist() == [10, 200, 200]


def test_colour_arrays_have_their_channels_moved_first(tmp_path: Path) -> None:
    x = pixels(4, 10, 10, 3)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=[0, 1, 0, 1], x_test=x[:2], y_test=[0, 1])
    assert torch.equal(images.load(f"npz:{tmp_path / 'a.npz'}").train, torch.from_numpy(x).permute(0, 3, 1, 2))


# ------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("name", ["{path}", "{path}/", "imagefolder:{path}"])
def test_a_folder_may_be_named_by_its_path_alone(name: str, tmp_path: Path) -> None:
    write_pngs(tmp_path / "photos/dark", 5, 10)
    assert len(images.load(name.format(path=tmp_path / "photos"), size=8).train) == 4


def test_arrays_may_be_named_by_their_path_alone(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=pixels(4, 8, 8), y_train=[0, 1, 0, 1], x_test=pixels(2, 8, 8), y_test=[0, 1])
    assert images.load(str(tmp_path / "a.npz")).train.shape == (4, 1, 8, 8)


def write_imagenette(root: Path, size: int) -> None:
    """Two of its classes, five images to train on and two held out of each; the second is lighter."""
    for part, count in (("train", 5), ("val", 2)):
        for shade, wnid in ((20, "n01440764"), (200, "n03888257")):
            folder = root / part / wnid
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (size, size), (shade, shade, shade)).save(folder / f"{i}.JPEG")


def test_imagenette_is_read_from_the_smallest_release_that_is_large_enough(tmp_path: Path) -> None:
    for size, folder in ((160, "imagenette2-160"), (320, "imagenette2-320")):
        write_imagenette(tmp_path / folder, size)
    (tmp_path / "imagenette2-160/train/n01440764/more.JPEG").write_bytes(
        (tmp_path / "imagenette2-160/train/n01440764/0.JPEG").read_bytes()
    )
    small, large = images.load("imagenette", tmp_path), images.load("imagenette", tmp_path, size=200)
    assert (small.size, len(small.train), len(small.test), small.classes) == (96, 11, 4, 2)
    assert (large.size, len(large.train)) == (200, 10)
    assert small.test_labels.tolist() == [0, 0, 1, 1]
    assert small.test[:, 0, 0, 0].tolist() == pytest.approx([20, 20, 200, 200], abs=2)


def test_imagenette_is_downloaded_in_the_release_that_its_size_asks_for(
    tmp_path: Path, served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = served
    write_imagenette(tmp_path / "made/imagenette2-320", 320)
    with tarfile.open(folder / "imagenette2-320.tgz", "w:gz") as archive:
        archive.add(tmp_path / "made/imagenette2-320", "imagenette2-320")
    md5 = hashlib.md5((folder / "imagenette2-320.tgz").read_bytes()).hexdigest()
    released = {**datasets.Imagenette._ARCHIVES, "320px": (f"{address}/imagenette2-320.tgz", md5)}
    monkeypatch.setattr(datasets.Imagenette, "_ARCHIVES", released)
    assert images.load("imagenette", tmp_path / "data", download=True, size=224).train.shape == (10, 3, 224, 224)
    assert images.load("imagenette", tmp_path / "data", size=224).classes == 2  # from now on it is there


def write_tiny_imagenet(root: Path) -> None:
    (root / "val/images").mkdir(parents=True)
    lines = []
    for i, wnid in enumerate(("n01443537", "n01629819", "n01641577")):
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        for k in range(4):
            Image.new("RGB", (64, 64), (80 * i,) * 3).save(root / "train" / wnid / f"images/{wnid}_{k}.JPEG")
        Image.new("RGB", (64, 64), (80 * i,) * 3).save(root / f"val/images/val_{2 - i}.JPEG")
        lines.append(f"val_{2 - i}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    (root / "val/val_annotations.txt").write_text("".join(reversed(lines)))


def test_tiny_imagenet_is_downloaded_and_read_in_its_own_layout(
    tmp_path: Path, served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = served
    write_tiny_imagenet(tmp_path / "made/tiny-imagenet-200")
    with zipfile.ZipFile(folder / "tiny-imagenet-200.zip", "w") as archive:
        for path in sorted((tmp_path / "made").rglob("*")):
            archive.write(path, path.relative_to(tmp_path / "made"))
    monkeypatch.setattr(image_folders, "TINY_IMAGENET", f"{address}/tiny-imagenet-200.zip")
    assert "not found or corrupted" in refusal(
        "tiny-imagenet", tmp_path / "data", download=True
    )  # not the published one
    md5 = hashlib.md5((folder / "tiny-imagenet-200.zip").read_bytes()).hexdigest()
    monkeypatch.setattr(image_folders, "TINY_IMAGENET_MD5", md5)
    loaded = images.load("tiny-imagenet", tmp_path / "data", download=True)
    assert loaded.train.shape == (12, 3, 64, 64)
    assert loaded.train_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert loaded.test_labels.tolist() == [2, 1, 0]  # in the order of val_annotations.txt
    assert loaded.test[:, 0, 0, 0].tolist() == pytest.approx([160, 80, 0], abs=2)


def write_imagenet(root: Path) -> None:
    for part, count in (("train", 3), ("val", 2)):
        write_pngs(root / part / "n01440764", count, 10)
        write_pngs(root / part / "n01443537", count, 200)


@pytest.mark.parametrize("folder", ["", "imagenet"])
def test_imagenet_stays_in_its_files(folder: str, tmp_path: Path) -> None:
    write_imagenet(tmp_path / folder)
    loaded = images.load("imagenet", tmp_path)
    assert isinstance(loaded, images.Folder)
    assert (loaded.size, loaded.channels, loaded.classes) == (224, 3, 2)
    assert loaded.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert loaded.test_labels.tolist() == [0, 0, 1, 1]
    assert loaded.read("test", 1).shape == (3, 30, 21)
    assert loaded.read("train", 5).unique().tolist() == [200]


def test_a_folder_too_large_for_memory_stays_in_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_imagenet(tmp_path)
    in_memory = images.load(str(tmp_path), size=16)
    monkeypatch.setattr(image_folders, "MEMORY", 10 * 3 * 16 * 16 - 1)
    in_files = images.load(str(tmp_path), size=16)
    assert isinstance(in_memory, images.Images)
    assert isinstance(in_files, images.Folder)
    for part, count in (("train", 6), ("test", 4)):
        assert torch.equal(getattr(in_files, f"{part}_labels"), getattr(in_memory, f"{part}_labels"))
        for i in range(count):
            pixels = functional.center_crop(functional.resize(in_files.read(part, i), [16]), [16])
            assert torch.equal(pixels, getattr(in_memory, part)[i])


def test_grey_files_become_rgb(tmp_path: Path) -> None:
    Image.fromarray(pixels(9, 9)).save(tmp_path / "grey.png")
    decoded = image_folders.decoded(tmp_path / "grey.png")
    assert decoded.shape == (3, 9, 9)
    assert torch.equal(decoded[0], torch.from_numpy(pixels(9, 9)))


def test_a_folder_of_photos_without_labels_is_of_one_class(tmp_path: Path) -> None:
    write_pngs(tmp_path / "photos", 10, 10)
    (tmp_path / "photos/notes.txt").write_text("no image")
    loaded = images.load(str(tmp_path / "photos"), size=8)
    assert loaded.train.shape == (8, 3, 8, 8)
    assert loaded.train_labels.tolist() == [0] * 8
    assert loaded.test_labels.tolist() == [0] * 2


def test_photos_are_turned_as_their_camera_was(tmp_path: Path) -> None:
    upright = Image.fromarray(pixels(6, 4, 3))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned right by a quarter
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(image_folders.decoded(tmp_path / "turned.png"), functional.pil_to_tensor(upright))
    assert image_folders.decoded(tmp_path / "turned.png", upright=False).shape == (3, 4, 6)  # as detection needs it


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("deep.png", np.array([[0, 257, 65535]], dtype=np.uint16)),
        ("float.tif", np.array([[0, 1 / 255, 1]], dtype=np.float32)),
        ("float.tif", np.array([[0, 1, 255]], dtype=np.float32)),
    ],
)
def test_deep_grey_images_are_scaled_from_their_range(name: str, values: np.ndarray[Any, Any], tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / name)
    assert image_folders.decoded(tmp_path / name)[0].tolist() == [[0, 1, 255]]


@pytest.mark.parametrize("values", [[[0, 300]], [[-1, 1]], [[0, np.nan]]])
def test_floats_of_an_unknown_range_are_refused(values: list[list[float]], tmp_path: Path) -> None:
    Image.fromarray(np.array(values, dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(images.DataError, match=r"float\.tif is no image that can be read \(its values reach from"):
        image_folders.decoded(tmp_path / "float.tif")


def test_of_a_very_long_image_the_middle_is_resized_and_not_all(monkeypatch: pytest.MonkeyPatch) -> None:
    image, seen = torch.from_numpy(pixels(3, 2, 4000)), []
    as_a_whole = functional.center_crop(functional.resize(image, [8]), [8])

    def resize(part: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(tuple(part.shape))
        return functional.resize_image(part, *args, **options)

    monkeypatch.setattr(functional, "resize", resize)
    for found, expected in ((image, as_a_whole), (image.mT, as_a_whole.mT)):
        off = image_folders.square(found, 8).int() - expected.int()
        assert off.abs().max() <= 1  # rounding
    image_folders.square(image[:, :, :32], 8)
    assert seen == [(3, 2, 32), (3, 32, 2), (3, 2, 32)]


def test_damaged_images_are_one_line_with_their_name(tmp_path: Path) -> None:
    (tmp_path / "odd.ppm").write_bytes(b"P6 2 x 255 ")
    whole = tmp_path / "whole.png"
    Image.fromarray(pixels(64, 64)).save(whole)
    damaged = bytearray(whole.read_bytes())
    damaged[45] ^= 255
    (tmp_path / "odd.png").write_bytes(damaged)
    os.mkfifo(tmp_path / "pipe.png")  # nobody writes into it
    for name in ("odd.ppm", "odd.png", "pipe.png"):
        with pytest.raises(images.DataError, match=rf".*{name} is no image that can be read"):
            image_folders.decoded(tmp_path / name)


# ------------------------------------------------------------------------------- what of a folder is taken and what is not


def ten_of_which_two_are_broken(folder: Path) -> Path:
    write_pngs(folder, 10, 10)
    for name in ("3.png", "9.png"):  # the second is held out
        (folder / name).write_bytes((folder / name).read_bytes()[:50])
    return folder


def test_broken_images_are_left_out_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = ten_of_which_two_are_broken(tmp_path / "photos")
    assert re.fullmatch(r".*3\.png is no image that can be read \(.*\)", refusal(str(photos), size=16))
    in_memory = images.load(str(photos), size=16, on_broken="skip")
    remark = "2 of 10 images of photos cannot be read and are left out (3.png, 9.png)"
    assert in_memory.remarks == (remark,)
    assert (in_memory.train.shape, in_memory.test.shape) == ((7, 3, 16, 16), (1, 3, 16, 16))
    assert in_memory.train.unique().tolist() == [10]  # no pixel of what was not read
    assert (len(in_memory.train_labels), len(in_memory.test_labels)) == (7, 1)
    monkeypatch.setattr(image_folders, "MEMORY", 0)
    for workers in (0, 2):
        in_files = images.load(str(photos), size=16, on_broken="skip", workers=workers)
        assert [Path(path).name for path in in_files.train_paths] == [f"{k}.png" for k in (0, 1, 2, 5, 6, 7, 8)]
        assert [Path(path).name for path in in_files.test_paths] == ["4.png"]
        assert in_files.remarks == (remark,)
    assert images.load(str(photos), size=16).remarks == ()  # nothing is read before it is needed


def test_a_folder_of_which_nothing_can_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(5):
        (tmp_path / f"{i}.png").touch()
    for limit in (image_folders.MEMORY, 0):
        monkeypatch.setattr(image_folders, "MEMORY", limit)
        assert re.fullmatch(
            r".*: none of the train images can be read, such as .*0\.png", refusal(str(tmp_path), on_broken="skip")
        )


def test_what_was_left_out_is_told_and_belongs_to_what_a_run_depends_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = ten_of_which_two_are_broken(tmp_path / "photos")
    args = ["--data", str(photos), "--image-size", "16", "--batch-size", "4", "--epochs", "1", "--device", "cpu"]
    args += ["--out", str(tmp_path / "run"), "--on-broken", "skip"]
    assert pretrain.main(args) == 0
    assert "warning: 2 of 10 images of photos cannot be read and are left out" in capsys.readouterr().err
    assert pretrain.main([*args, "--resume", "auto"]) == 0  # finished, with the same images
    capsys.readouterr()
    Image.new("RGB", (20, 30)).save(photos / "3.png")
    with pytest.raises(SystemExit):
        pretrain.main([*args, "--resume", "auto"])
    assert re.search(r"holds a run with other settings: train_images 7 \(.*\), not 8 \(", capsys.readouterr().err)


def test_hidden_files_are_no_images_and_hidden_folders_no_classes(tmp_path: Path) -> None:
    write_pngs(tmp_path / "photos", 10, 10)
    write_pngs(tmp_path / "photos/.thumbnails", 3, 10)
    write_pngs(tmp_path / "photos/__MACOSX", 3, 10)
    (tmp_path / "photos/._0.png").write_bytes(b"a resource fork")
    (tmp_path / "photos/notes").mkdir()
    loaded = images.load(str(tmp_path / "photos"), size=8)
    assert (len(loaded.train) + len(loaded.test), loaded.classes, loaded.remarks) == (10, 1, ())


def test_images_beside_the_classes_are_left_out_and_told(tmp_path: Path) -> None:
    write_pngs(tmp_path / "photos/dark", 5, 10)
    write_pngs(tmp_path / "photos/light", 5, 200)
    for i in range(4):
        Image.new("RGB", (9, 9)).save(tmp_path / f"photos/beside{i}.png")
    (remark,) = images.load(str(tmp_path / "photos"), size=8).remarks
    assert re.fullmatch(
        r"4 images lie beside the folders of .*photos, which are its classes, and are left out \(beside0\.png, "
        r"beside1\.png, beside2\.png, \.\.\.\): move them into one, or all images into one folder",
        remark,
    )


def test_no_image_comes_twice_where_links_lead_in_circles(tmp_path: Path) -> None:
    write_pngs(tmp_path / "photos/dark", 5, 10)
    write_pngs(tmp_path / "elsewhere", 5, 200)
    (tmp_path / "photos/dark/again").symlink_to(tmp_path / "photos")
    (tmp_path / "photos/linked").symlink_to(tmp_path / "elsewhere")
    loaded = images.load(str(tmp_path / "photos"), size=8)
    assert torch.cat([loaded.train_labels, loaded.test_labels]).bincount().tolist() == [10, 5]


def test_train_and_val_may_hold_images_without_classes(tmp_path: Path) -> None:
    write_pngs(tmp_path / "photos/train", 4, 10)
    write_pngs(tmp_path / "photos/val", 1, 200)
    loaded = images.load(str(tmp_path / "photos"), size=8)
    assert (len(loaded.train), len(loaded.test), loaded.classes) == (4, 1, 1)


def test_a_folder_named_by_a_dot_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pngs(tmp_path / "photos/within", 5, 10)
    monkeypatch.chdir(tmp_path / "photos/within")
    assert images.load("imagefolder:.", size=8).name == "within"
    assert images.load("imagefolder:..", size=8).name == "photos"


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (["a.gif", "below/b.gif"], r".* holds no images, nor do its folders: none ends with \.jpg, .*"),
        (["0.png", "1.png", "2.png", "3.png"], r".* has 4 images, too few to train on four fifths of them .*"),
        (
            ["dark/0.png", "light/notes.txt"],
            r".*: every folder is a class, and there are no images in light: move it away",
        ),
    ],
)
def test_folders_that_cannot_be_taken_are_one_line(made: list[str], message: str, tmp_path: Path) -> None:
    for name in made:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    assert re.fullmatch(message, refusal(str(tmp_path / "photos")))


def test_what_is_missing_or_laid_out_otherwise_is_one_line(tmp_path: Path) -> None:
    assert re.fullmatch(
        r"imagenette is not in .* \(no imagenette2-160\); add --download.*", refusal("imagenette", tmp_path)
    )
    assert "(no imagenette2)" in refusal("imagenette", tmp_path, size=400)
    assert re.fullmatch(r"tiny-imagenet is not in .*; add --download.*", refusal("tiny-imagenet", tmp_path))
    assert re.fullmatch(r"there is no directory .*nowhere \(--data-dir\).*", refusal("imagenet", tmp_path / "nowhere"))
    assert re.fullmatch(r"imagenet is not in .*: neither train/ and val/ nor.*", refusal("imagenet", tmp_path))
    assert "imagenet has nothing to download" in refusal("imagenet", tmp_path, download=True)
    assert re.fullmatch(r"there is no directory .*/photos", refusal(f"{tmp_path}/photos/"))
    write_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    (tmp_path / "tiny-imagenet-200/val/val_annotations.txt").write_text("val_0.JPEG\tn99999999\n")
    assert "is not laid out as tiny-imagenet is: val/val_annotations.txt" in refusal("tiny-imagenet", tmp_path)
    write_pngs(tmp_path / "odd/train/dark", 2, 10)
    write_pngs(tmp_path / "odd/val/light", 2, 10)
    assert re.fullmatch(r".*train and .*val must have the same classes", refusal(str(tmp_path / "odd")))
    (tmp_path / "odd/train/dark/0.png").write_text("no image")
    write_pngs(tmp_path / "odd/val/dark", 2, 10)
    write_pngs(tmp_path / "odd/train/light", 2, 10)
    assert re.fullmatch(r".*0.png is no image that can be read \(.*\)", refusal(str(tmp_path / "odd")))


# -------------------------------------------------------------------------------------------------------------- errors


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    x, y = pixels(4, 8, 8), np.array([0, 1, 0, 1])

    def refused(**arrays: Any) -> str:
        np.savez(tmp_path / "a.npz", **arrays)
        return refusal(f"npz:{tmp_path / 'a.npz'}")

    assert "lacks y_train, y_test" in refused(x_train=x, x_test=x)
    assert "x_train must be uint8 (N, H, W, C), not float64" in refused(x_train=x / 255, y_train=y, x_test=x, y_test=y)
    path = tmp_path / "a.npz"
    assert refused(x_train=x, y_train=y[:3], x_test=x, y_test=y).startswith(
        f"{path} has 4 train images and 3 labels for them"
    )
    assert refused(x_train=x, y_train=y, x_test=x[:0], y_test=y[:0]).startswith(f"{path} has no test images")
    assert "x_train must be uint8 (N, H, W, C) with 1 or 3 channels C, not (4, 8, 8, 2)" in refused(
        x_train=pixels(4, 8, 8, 2), y_train=y, x_test=x, y_test=y
    )
    assert f"{path}: y_train must hold numbers, not Python's objects (dtype object)" == refused(
        x_train=x, y_train=y.astype(object), x_test=x, y_test=y
    )
    assert "count from 0; the least is -1" in refused(x_train=x, y_train=y - 1, x_test=x, y_test=y)
    assert "must count from 0; the largest is 1000000001" in refused(x_train=x, y_train=y + 10**9, x_test=x, y_test=y)
    names = np.array(["cat", "dog", "cat", "dog"])
    assert "y_train must be whole numbers from 0, one per image, not <U3" in refused(
        x_train=x, y_train=names, x_test=x, y_test=y
    )
    assert "y_test must be whole numbers from 0, one per image, not float64" in refused(
        x_train=x, y_train=y, x_test=x, y_test=y / 2
    )
    assert "x_test must be uint8 (N, H, W, C), not uint8 (4, 0, 8)" in refused(
        x_train=x, y_train=y, x_test=x[:, :0], y_test=y
    )
    assert "test has 3" in refused(x_train=x, y_train=y, x_test=pixels(4, 8, 8, 3), y_test=y)


@pytest.mark.parametrize("dtype", [">i4", ">u2", "bool"])
def test_labels_may_be_whole_numbers_of_any_kind(dtype: str, tmp_path: Path) -> None:
    x, y = pixels(4, 8, 8), np.array([0, 1, 0, 1], dtype=dtype)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y[:, None])
    loaded = images.load(str(tmp_path / "a.npz"))
    assert loaded.train_labels.tolist() == loaded.test_labels.tolist() == [0, 1, 0, 1]


def test_an_archive_that_is_damaged_or_none_is_one_line(tmp_path: Path) -> None:
    x, y = pixels(4, 8, 8), np.array([0, 1, 0, 1])
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    whole = (tmp_path / "a.npz").read_bytes()
    np.save(tmp_path / "b.npy", x)
    for contents in (
        whole[: len(whole) // 2],
        whole[:200] + bytes(200) + whole[400:],
        (tmp_path / "b.npy").read_bytes(),
        pickle.dumps({"x_train": x}),
    ):
        (tmp_path / "a.npz").write_bytes(contents)
        line = refusal(str(tmp_path / "a.npz"))
        assert "a.npz cannot be read as an .npz file (" in line
        assert "allow_pickle" not in line


def test_a_damaged_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_fashion_mnist(tmp_path, monkeypatch)
    path = tmp_path / "FashionMNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(images.DataError, match="fashion-mnist cannot be read from"):
        images.load("fashion-mnist", tmp_path)


def test_images_without_labels_are_trained_on_and_not_read_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(20):
        Image.new("RGB", (12, 10), (12 * i, 100, 50)).save(tmp_path / f"photos/{i}.png")
    args = ["--data", str(tmp_path / "photos"), "--image-size", "16", "--batch-size", "8", "--epochs", "1"]
    args += ["--device", "cpu", "--out", str(tmp_path / "run")]
    assert pretrain.main(args) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        knn_eval.main([str(tmp_path / "run"), "--device", "cpu"])
    assert capsys.readouterr().err.startswith("error: photos has no labels, or one class only")
    Image.new("RGB", (12, 10)).save(tmp_path / "photos/more.png")
    with pytest.raises(SystemExit, match="2"):
        pretrain.main([*args, "--resume", "auto"])
    assert re.search(r"a run with other settings: train_images 16 \(.*\), not 17 \(", capsys.readouterr().err)
