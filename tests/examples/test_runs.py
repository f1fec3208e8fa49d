"""A run's directory: what is written whole, what is kept, what a damaged file does, and what comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn", reason="the examples need the extra `examples`")
pytest.importorskip("safetensors")

from backbones import ARCHITECTURES
from command_line import write
from inputs import images
from pretraining import runs
from pretraining.norms import by_groups
from tiny_pretrain import TINY, Tiny
from torch import nn

SETTINGS = {"arch": "tiny", "image_size": 12, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5], "norm": "batch"}


@pytest.fixture(autouse=True)
def float32_and_a_tiny_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY)


def checkpoint(step: int, backbone: nn.Module) -> dict[str, Any]:
    return {"step": step, "backbone": backbone.state_dict()}


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    weights = other.state_dict()
    return all(torch.equal(value, weights[name]) for name, value in one.state_dict().items())


def refusal(path: Path) -> str:
    with pytest.raises(images.DataError) as refused:
        runs.load(path)
    (line,) = str(refused.value).splitlines()
    return line


def flip_a_bit(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_finished_run_loads_from_its_directory_and_from_its_weights(tmp_path: Path, kind: str) -> None:
    trained = Tiny()
    runs.write_settings(tmp_path, SETTINGS)
    path = runs.save_backbone(tmp_path, trained, kind)
    assert path.name == f"backbone.{kind}"
    for place in (tmp_path, path):
        run = runs.load(place)
        assert same_weights(run.backbone, trained)
        assert not run.backbone.training
        assert (run.settings, run.stages, run.mean, run.std) == (
            SETTINGS,
            ("low", "middle", "top"),
            (0.5, 0.5, 0.5),
            (0.25, 0.5, 0.5),
        )


def test_a_run_with_group_norm_comes_back_with_it(tmp_path: Path) -> None:
    trained = by_groups(Tiny())
    runs.write_settings(tmp_path, SETTINGS | {"norm": "group"})
    runs.save_backbone(tmp_path, trained, "pt")
    found = runs.load(tmp_path).backbone
    assert same_weights(found, trained)
    x = torch.randn(3, 3, 12, 12)
    assert torch.equal(found(x), trained.eval()(x))


def test_an_unfinished_run_loads_from_its_newest_checkpoint_or_any(tmp_path: Path) -> None:
    older, newer = Tiny(), Tiny()
    runs.write_settings(tmp_path, SETTINGS)
    runs.save_checkpoint(tmp_path, 9, checkpoint(9, older))
    runs.save_checkpoint(tmp_path, 10, checkpoint(10, newer))
    assert same_weights(runs.load(tmp_path).backbone, newer)
    assert same_weights(runs.load(tmp_path / "checkpoint-00000009.pt").backbone, older)


def test_the_newest_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (5, 90, 100, 1000):
        runs.save_checkpoint(tmp_path, step, {"step": step})
    assert [path.name for path in runs.checkpoints(tmp_path)] == ["checkpoint-00001000.pt", "checkpoint-00000100.pt"]
    assert runs.newest_checkpoint(tmp_path) == {"step": 1000}


@pytest.mark.parametrize("damage", [flip_a_bit, lambda path: path.write_bytes(path.read_bytes()[:-99]), Path.touch])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    damage: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        runs.save_checkpoint(tmp_path, step, {"step": step, "weights": torch.arange(5000)})
    newest = tmp_path / "checkpoint-00000002.pt"
    if damage is Path.touch:
        newest.write_bytes(b"")
    else:
        damage(newest)
    assert runs.newest_checkpoint(tmp_path)["step"] == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {newest} is damaged (")
    (tmp_path / "checkpoint-00000001.pt").write_bytes(b"")
    with pytest.raises(images.DataError, match=f"every checkpoint in {tmp_path} is damaged; delete them to start anew"):
        runs.newest_checkpoint(tmp_path)


def test_a_checkpoint_is_taken_up_unless_it_is_another_runs(tmp_path: Path) -> None:
    class Training:
        step = 0

        def restore(self, state: dict[str, Any]) -> None:
            self.step = state["step"]

    training = Training()
    runs.take_up(tmp_path, training, steps=5)
    assert training.step == 0  # there is none
    runs.save_checkpoint(tmp_path, 5, {"step": 5})
    runs.take_up(tmp_path, training, steps=5)
    assert training.step == 5
    with pytest.raises(images.DataError, match=r"newest checkpoint of .* is of step 5; this run ends at 4"):
        runs.take_up(tmp_path, training, steps=4)
    runs.save_checkpoint(tmp_path, 6, {"epoch": 1})
    with pytest.raises(images.DataError, match=r"newest checkpoint of .* is not one of this run"):
        runs.take_up(tmp_path, training, steps=9)


def test_a_checkpoint_that_was_being_written_is_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-00000007.pt.unfinished").write_bytes(b"half of")
    assert runs.newest_checkpoint(tmp_path) is None
    runs.save_checkpoint(tmp_path, 8, {"step": 8})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000008.pt"]


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        assert refusal(path).endswith(
            f"{tmp_path} is no run of pretrain.py: there is no {tmp_path}/run.json that can be read"
        )
    (tmp_path / "run.json").write_text("[1, 2]")
    assert "run.json is another program's" in refusal(tmp_path)
    runs.write_settings(tmp_path, SETTINGS)
    assert refusal(tmp_path).endswith("is of a run that has not come to its first checkpoint")
    assert "checkpoint-00000001.pt cannot be read" in refusal(tmp_path / "checkpoint-00000001.pt")
    (tmp_path / "log.jsonl").write_text('{"step": 1}')
    assert f"{tmp_path / 'log.jsonl'} is no checkpoint: give the run's directory" in refusal(tmp_path / "log.jsonl")
    runs.save_backbone(tmp_path, nn.Linear(3, 3), "pt")
    assert refusal(tmp_path).endswith("holds weights of another architecture than tiny")
    (tmp_path / "backbone.pt").write_bytes((tmp_path / "backbone.pt").read_bytes()[:-99])
    assert "backbone.pt cannot be read: " in refusal(tmp_path)
    runs.write_settings(tmp_path, SETTINGS | {"arch": "resnet19"})
    assert refusal(tmp_path).startswith("there is no backbone 'resnet19': there are resnet18, ")


def test_the_log_is_cut_after_a_step_and_loses_what_was_half_written(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "losses": [1 / step]}) + "\n" for step in (2, 4, 6)]
    (tmp_path / "log.jsonl").write_text("".join(lines) + '{"step": 8, "los')
    assert [line["step"] for line in runs.read_log(tmp_path)] == [2, 4, 6]
    runs.cut_log(tmp_path, 4)
    assert (tmp_path / "log.jsonl").read_text() == "".join(lines[:2])
    assert runs.read_log(tmp_path / "elsewhere") == []


def test_a_damaged_line_of_the_log_is_told_with_its_file(tmp_path: Path) -> None:
    for line, what in (("garbage", "is no JSON"), ("[1, 2]", r"says \[1, 2\]"), ('{"lr": 1}', "has no step")):
        (tmp_path / "log.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
        with pytest.raises(images.DataError, match=rf"log\.jsonl is damaged: a line of it {what}"):
            runs.read_log(tmp_path)


def test_a_full_disk_is_told_with_its_file_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    def fill(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("unexpected pos 64 vs 0")  # as torch.save does

    with pytest.raises(OSError, match=r"the disk may be full \(unexpected pos 64 vs 0\).*weights\.pt"):
        write(tmp_path / "weights.pt", fill)
    assert not list(tmp_path.iterdir())
