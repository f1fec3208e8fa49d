"""examples/few_labels.py: the same labelled images for all backbones, and what fine-tuning them reaches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the examples need the extra `examples`")
pytest.importorskip("rich")
pytest.importorskip("tqdm")

import few_labels
import overlap_curve
from pretraining import runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run of overlap_curve.py on digits."""
    torch.set_default_dtype(torch.float32)
    out = tmp_path_factory.mktemp("runs")
    chosen = ["--curves", "contrastive-6", "--rows", "1", "--seeds", "3"]
    few = ["--images", "128", "--held-out", "60", "--batch-size", "64", "--epochs", "1"]
    assert overlap_curve.main(["--data", "digits", "--out", str(out), "--device", "cpu", *chosen, *few]) == 0
    return out / "contrastive-6" / "1" / "seed-3"


def test_of_each_class_as_many_are_labelled_and_always_the_same() -> None:
    labels = torch.tensor([0, 1, 2, 0] * 25)
    known = few_labels.labelled(labels, percent=12, seed=1)
    assert labels[known].bincount().tolist() == [4, 4, 4]
    assert torch.equal(known, few_labels.labelled(labels, percent=12, seed=1))
    assert not torch.equal(known, few_labels.labelled(labels, percent=12, seed=2))
    assert len(few_labels.labelled(labels, percent=0.1, seed=0)) == 3  # one of each at least


def test_a_run_is_fine_tuned_on_its_own_images(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    before = {name: value.clone() for name, value in runs.load(run).backbone.state_dict().items()}
    few = ["--percent", "25", "100", "--epochs", "15", "--batch-size", "16", "--device", "cpu", "--scratch"]
    assert few_labels.main([str(run), *few]) == 0
    printed = capsys.readouterr().out
    assert "overlap 1" in printed
    assert "random start" in printed
    found = json.loads((run / "few_labels.json").read_text())
    assert found["run"]["images"] == 128
    assert found["accuracy"].keys() == {"25", "100"}
    assert found["accuracy"]["100"] > 0.3  # ten classes, and the head at least has learnt
    scratch = json.loads((run / "few_labels-scratch.json").read_text())
    assert scratch["start"] == few_labels.SCRATCH
    after = runs.load(run).backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_same_command_gives_the_same_accuracy(run: Path) -> None:
    torch.set_default_dtype(torch.float32)
    few = ["--percent", "50", "--epochs", "1", "--device", "cpu"]
    found = []
    for _ in range(2):
        assert few_labels.main([str(run), *few]) == 0
        found.append(json.loads((run / "few_labels.json").read_text())["accuracy"])
    assert found[0] == found[1]


def test_a_class_that_no_training_image_has_is_said_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = np.zeros((8, 8, 8), dtype=np.uint8), np.arange(8) % 2
    np.savez(tmp_path / "odd.npz", x_train=x, y_train=y, x_test=x, y_test=y + 1)
    with pytest.raises(SystemExit) as ended:
        few_labels.main([str(run), "--data", str(tmp_path / "odd.npz")])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "odd: no training image has the label 2, as held-out ones do" in line


def test_more_than_all_labels_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        few_labels.main(["run", "--percent", "200"])
    assert capsys.readouterr().err == "error: argument --percent: expected a number above 0 up to 100, got '200'\n"


def test_what_is_no_run_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        few_labels.main([str(tmp_path)])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is no run of pretrain.py" in line
