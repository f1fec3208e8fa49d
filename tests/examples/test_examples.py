"""The quickstart and wrap_your_own: a whole run, few steps, older results, and each error's line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="the examples need the extra `examples`")
pytest.importorskip("sklearn")

import quickstart
import wrap_your_own
from matplotlib.figure import Figure
from PIL import Image


@pytest.fixture(autouse=True)
def float32_on_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------- the quickstart

FEW_STEPS = ["--epochs", "2", "--batch-size", "600"]  # two an epoch


def test_all_methods_start_from_the_same_weights_of_backbone_and_decoders() -> None:
    simclr, gim, loco = (quickstart.new_model(overlap, seed=3) for overlap in quickstart.OVERLAPS.values())
    for model in (gim, loco):
        for name, value in model.backbone.state_dict().items():
            assert torch.equal(value, simclr.backbone.state_dict()[name]), name
    starts = {decoder.channels: decoder.state_dict() for decoder in gim.decoders}
    for decoder in [*simclr.decoders, *loco.decoders]:
        for name, value in decoder.state_dict().items():
            assert torch.equal(value, starts[decoder.channels][name]), name
    assert [len(model.plan.units) for model in (simclr, gim, loco)] == [1, 6, 5]


def test_a_run_of_four_steps_ends_with_a_table_results_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep/er"
    quickstart.main([*FEW_STEPS, "--out", str(out)])
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert list(results["table"]) == ["random start", "SimCLR", "Greedy InfoMax", "LoCo"]
    for name, (probe, knn, *costs) in results["table"].items():
        assert 10 < probe <= 100
        assert 10 < knn <= 100
        assert re.search(rf"^{name} +{probe:.1f} +{knn:.1f}", printed, re.MULTILINE), printed
        assert (None in costs) == (name == "random start")
    memory, flops = zip(*[row[2:] for row in list(results["table"].values())[1:]], strict=True)
    assert memory[1] < memory[2] < memory[0]
    assert max(flops[:2]) < flops[2]
    assert np.array(results["losses"]["LoCo"]).shape == (2, 5)  # (epochs, units)
    assert results["torch"] == torch.__version__
    assert max(len(line) for line in re.split(r"[\r\n]", printed) if "wrote" not in line) <= 80
    with Image.open(out / "quickstart.png") as picture:
        assert min(picture.size) > 800
        assert len(set(picture.convert("L").resize((200, 120)).tobytes())) > 50  # something is drawn
    assert sorted(path.name for path in out.iterdir()) == ["quickstart.png", "results.json"]


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11])
def test_the_learning_rate_of_few_steps_falls_and_is_never_above_its_own(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: object) -> None:
        step(self, *args)
        rates.append(self.param_groups[0]["lr"])

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    views = [list(torch.rand(2, 4, 1, 8, 8)) for _ in range(steps)]
    losses = quickstart.train("LoCo", quickstart.new_model(1, seed=0), views, epochs=1)
    assert np.array(losses).shape == (1, 5)
    assert len(rates) == steps
    assert rates[0] == max(rates) == quickstart.LEARNING_RATE
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0


def test_curves_above_chance_are_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: shown.append(self) or save(self, *a, **k))
    table = {name: [50.0, 50.0, 1.0, 1.0] for name in ("random start", *quickstart.OVERLAPS)}
    losses = {name: [[30.0]] for name in quickstart.OVERLAPS}  # one epoch, far above log(2N - 1)
    quickstart.draw({"batch_size": 128, "table": table, "losses": losses}, tmp_path / "it.png")
    for panel in shown[0].axes[:3]:
        low, high = panel.get_ylim()
        assert low < np.log(255) < 30 < high
        assert panel.lines[0].get_marker() == "."  # a line needs two points


def test_older_results_are_kept(tmp_path: Path) -> None:
    for text in ("first", "second", "third"):
        quickstart.free(tmp_path / "results.json").write_text(text)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"results.json": "third", "results.json.1": "first", "results.json.2": "second"}


def test_an_interrupt_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "train", interrupt)
    with pytest.raises(SystemExit) as stopped:
        quickstart.main([*FEW_STEPS, "--out", str(tmp_path)])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "\nstopped\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--batch-size 1288", "error: --epochs is from 1 up, --batch-size from 2 to 1287"),
        ("--batch-size 1", "error: --epochs is from 1 up, --batch-size from 2 to 1287"),
        ("--epochs 0", "error: --epochs is from 1 up, --batch-size from 2 to 1287"),
        ("--epochs 1.5", ".*argument --epochs: invalid int value: '1.5'"),
        ("--out file", "error: cannot write to file: File exists"),
        ("--out file/below", "error: cannot write to file/below: Not a directory"),
        ("--wings 2", ".*unrecognized arguments: --wings 2"),
    ],
)
def test_a_wrong_argument_is_told(
    argv: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SystemExit) as stopped:
        quickstart.main(argv.split())
    assert stopped.value.code == 2
    assert re.fullmatch(message, capsys.readouterr().err.splitlines()[-1])


# ------------------------------------------------------------------------------------------------------- wrap_your_own


@pytest.mark.parametrize("place", ["file/below.pt", "folder"])
def test_wrap_your_own_tells_before_it_trains_that_it_cannot_write(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=place.split("/", maxsplit=1)[0]):
        wrap_your_own.main(path=tmp_path / place)
    assert capsys.readouterr().out == ""  # not even the plan


def test_to_see_whether_a_file_can_be_written_leaves_all_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "old.pt").write_text("weights")
    for name in ("old.pt", "new/new.pt"):
        wrap_your_own.check_writable(tmp_path / name)
    assert (tmp_path / "old.pt").read_text() == "weights"
    assert not list((tmp_path / "new").iterdir())


def test_wrap_your_own_trains_and_leaves_plain_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrap_your_own.main(epochs=2, path=tmp_path / "new/backbone.pt")
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"unit \d (\d\.\d\d)", printed)]
    assert len(losses) == 4
    assert losses[2] < losses[0]
    assert losses[3] < losses[1]
    assert float(re.search(r"linear probe: (\d+\.\d)%", printed)[1]) > 50
    assert torch.load(tmp_path / "new/backbone.pt").keys() == wrap_your_own.Backbone().state_dict().keys()
