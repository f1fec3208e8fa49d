"""Data sets that are not there are told in one line."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.error import URLError

import pytest

pytest.importorskip("sklearn", reason="the examples need the extra `examples`")

from inputs import images
from torchvision import datasets


@pytest.mark.parametrize(
    ("name", "directory", "message"),
    [
        ("mnist", "data", "unknown data set 'mnist': choose digits, cifar10, .*"),
        ("imagefolder:", "data", "unknown data set 'imagefolder:': choose .*"),
        ("imagefolder:nowhere", "data", "there is no .*nowhere"),
        ("npz:nowhere.npz", "data", "nowhere.npz cannot be read as an .npz file .*No such file.*"),
        ("npz:file", "data", "file cannot be read as an .npz file .*"),
        ("cifar10", "nowhere", r"there is no directory nowhere \(--data-dir\) .* --download makes it"),
        ("cifar10", "empty", r"cifar10 cannot be read from empty \(Dataset not found.*\); add --download.*"),
        ("cifar100", "empty", r"cifar100 cannot be read from empty \(Dataset not found.*\); add .*"),
        ("stl10", "empty", r"stl10 cannot be read from empty \(Dataset not found.*\); add --download.*"),
        ("fashion-mnist", "empty", r"fashion-mnist cannot be read from empty \(.*\); add --download.*"),
    ],
)
def test_what_cannot_be_loaded_is_told(
    name: str, directory: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no archive")
    with pytest.raises(images.DataError) as refused:
        images.load(name, Path(directory))
    assert re.fullmatch(message, str(refused.value))


def test_digits_have_nothing_to_download() -> None:
    with pytest.raises(images.DataError, match=r"--download is for cifar10, .*; digits has nothing to download"):
        images.load("digits", download=True)


def test_a_download_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(dataset: datasets.CIFAR10) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", no_network)
    with pytest.raises(
        images.DataError, match=r"cifar10 cannot be read from .*new \(<urlopen error no route to host>\)"
    ):
        images.load("cifar10", tmp_path / "new", download=True)
