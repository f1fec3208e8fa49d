"""The paper's figures: what the CSVs say, that something is drawn, and each error's line."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="the examples need the extra `examples`")
pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("tqdm")

import backbones
import figures
from drawing import charts, figure_style
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn


class Pixels(nn.Module):
    """Its one stage's outlet is the image itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Conv2d(3, 3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer1(x)


@pytest.fixture(autouse=True)
def float32_and_a_small_architecture(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.set_default_dtype(torch.float32)
    monkeypatch.setitem(backbones.ARCHITECTURES, "pixels", backbones.Architecture(lambda size: Pixels(), ("layer1",)))
    return


METHODS = {"simclr": [[0, 3]], "gim": [[0, 0], [1, 1], [2, 2], [3, 3]], "loco": [[0, 1], [1, 2], [2, 3]]}


def write_run(directory: Path, method: str, seed: int = 0, **settings: Any) -> Path:
    """Six steps of losses that say whose they are: method's place + unit / 10 + seed / 100."""
    directory.mkdir(parents=True)
    units = METHODS[method]
    about = {
        "arch": "pixels",
        "data": "digits",
        "image_size": 8,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "decoder": "conv",
    }
    about |= {"method": method, "seed": seed, "units": units, **settings}
    (directory / "run.json").write_text(json.dumps(about))
    place = list(METHODS).index(method)
    losses = [place + unit / 10 + seed / 100 for unit in range(len(units))]
    lines = [json.dumps({"step": 10 * k, "epoch": k / 2, "losses": losses}) + "\n" for k in range(1, 7)]
    (directory / "log.jsonl").write_text("".join(lines))
    accuracy = [0.5, 0.6, 0.7, 0.8 - place / 10 + seed / 100]
    stages = ["layer1", "layer2", "layer3", "layer4"]
    results = {"stages": stages, "run": about, "encoder": directory.name, "arch": "pixels", "seed": 0}
    results |= {"data": "digits", "test": 510, "image_size": 8}
    linear = results | {"protocol": "fast", "accuracy": accuracy}
    (directory / "linear_eval-fast-digits.json").write_text(json.dumps(linear))
    by_k = {"20": accuracy, "200": [0.1] * 4}
    (directory / "knn_eval-digits.json").write_text(json.dumps(results | {"accuracy": by_k}))
    torch.save({"layer1.weight": torch.eye(3).view(3, 3, 1, 1)}, directory / "backbone.pt")
    return directory


def drawn(*argv: Any, out: Path) -> list[dict[str, str]]:
    """Draw a figure; the rows of its CSV, after a look at its PNG."""
    assert figures.main([*map(str, argv), "--out", str(out)]) == 0
    (path,) = out.glob("*.png")
    with Image.open(path) as picture:
        assert min(picture.size) > 300
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 30
    assert path.with_suffix(".csv").is_file()
    with path.with_suffix(".csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were drawn, to look into."""
    kept: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        kept.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


# ------------------------------------------------------------------------------------------------------------ Figure 2


def test_losses_of_every_decoder_are_drawn_by_method(tmp_path: Path, shown: list[Figure]) -> None:
    runs = [write_run(tmp_path / f"{m}-{seed}", m, seed) for m in ("loco", "simclr", "gim") for seed in (0, 1, 2)]
    rows = drawn("losses", *runs, out=tmp_path / "out")
    assert len(rows) == 3 * 6 * (1 + 4 + 3)
    (row,) = [r for r in rows if (r["method"], r["seed"], r["unit"], r["step"]) == ("LoCo", "2", "1", "60")]
    assert (row["first"], row["last"], float(row["epoch"]), float(row["loss"])) == ("1", "2", 3.0, 2 + 0.1 + 0.02)

    panels = shown[0].axes
    assert [panel.get_title("left") for panel in panels] == ["SimCLR", "Greedy InfoMax", "LoCo"]
    # a thin and a thick line for each unit, at the mean of the seeds; SimCLR's once more in the others
    ends = [sorted({round(float(line.get_ydata()[-1]), 6) for line in panel.lines}) for panel in panels]
    assert ends == [[0.01], [0.01, 1.01, 1.11, 1.21, 1.31], [0.01, 2.01, 2.11, 2.21]]
    labels = {text.get_text() for text in panels[2].texts}
    assert labels == {"stages 0 to 1", "stages 1 to 2", "stages 2 to 3", "SimCLR"}
    assert "mean of 3 runs" in shown[0].get_suptitle()


def test_runs_of_one_method_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / decoder, "gim", decoder=decoder) for decoder in ("conv", "mlp")]
    rows = drawn("losses", *runs, out=tmp_path / "out")
    assert {row["method"] for row in rows} == {"Greedy InfoMax, decoder conv", "Greedy InfoMax, decoder mlp"}


def test_labels_at_the_ends_of_lines_do_not_overlap() -> None:
    panel = Figure().subplots()
    panel.set_ylim(0, 10)
    figure_style.label_ends(panel, ["a", "b", "c", "d"], [(1, 5.0), (1, 5.1), (1, 1.0), (1, 5.05)], ["black"] * 4)
    heights = {text.get_text(): text.xy[1] for text in panel.texts}
    assert heights["c"] == 1
    assert heights["b"] > heights["d"] > heights["a"]
    assert min(np.diff(sorted(heights.values()))) > 0.5


def test_smoothing_keeps_length_and_a_constant() -> None:
    assert charts.smooth([2.0] * 100) == [2.0] * 100
    assert charts.smooth([0.0, 4.0] * 40)[-1] == 2


# ------------------------------------------------------------------------------------------------------------ Figure 3


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Twelve held-out images of each of three classes, each of its own colour."""
    pixels, labels = np.random.default_rng(0).integers(0, 30, (36, 8, 8, 3), dtype=np.uint8), np.arange(36) % 3
    for image, label in zip(pixels, labels, strict=True):
        image[..., label] += 200
    np.savez(tmp_path / "colours.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    return tmp_path / "colours.npz"


def test_the_vectors_of_classes_lie_together_in_the_plane(tmp_path: Path, colours: Path, shown: list[Figure]) -> None:
    runs = [write_run(tmp_path / method, method, data=str(colours)) for method in METHODS]
    rows = drawn("tsne", *runs, "--classes", 2, "--images", 10, "--device", "cpu", out=tmp_path / "out")
    assert len(rows) == 3 * 2 * 10
    for method in ("SimCLR", "Greedy InfoMax", "LoCo"):
        own = [row for row in rows if row["method"] == method]
        places = [np.array([(float(r["x"]), float(r["y"])) for r in own if r["label"] == label]) for label in "01"]
        centres = [place.mean(axis=0) for place in places]
        apart = np.linalg.norm(centres[0] - centres[1])
        assert all(
            np.linalg.norm(place - centre, axis=1).max() < apart for place, centre in zip(places, centres, strict=True)
        )
    assert [panel.get_title("left") for panel in shown[0].axes] == ["SimCLR", "Greedy InfoMax", "LoCo"]


def test_the_first_images_of_the_first_classes_are_taken() -> None:
    labels = torch.tensor([2, 0, 1, 0, 0, 1, 2, 1])
    assert figures.first_of_each_class(labels, 2, 2).tolist() == [1, 3, 2, 5]


# ------------------------------------------------------------------------------------------------------------- Table 7


def test_the_savings_of_every_training_are_drawn_by_backbone(tmp_path: Path, shown: list[Figure]) -> None:
    for arch, loco in (("presnet50", 2.7), ("resnet50", 1.3)):
        (tmp_path / arch).mkdir()
        rows = [{"method": "end-to-end (SimCLR)", "peak_saving": 1, "saved_saving": 1, "saving_in_paper": None}]
        rows.append(
            {"method": "LoCo (`overlap=1`)", "peak_saving": loco, "saved_saving": 2 * loco, "saving_in_paper": 2.76}
        )
        tables = {"setting": {"arch": arch}, "methods": rows}
        (tmp_path / arch / "memory.json").write_text(json.dumps(tables))
    rows = drawn("memory", tmp_path / "presnet50", tmp_path / "resnet50", out=tmp_path / "out")
    assert rows[1] == {
        "arch": "presnet50",
        "method": "LoCo (`overlap=1`)",
        "peak": "2.7",
        "saved": "5.4",
        "in_paper": "2.76",
    }
    panels = shown[0].axes
    assert [panel.get_title("left") for panel in panels] == ["presnet50", "resnet50"]
    assert sorted(bar.get_width() for bar in panels[1].patches) == [1, 1, 1.3, 2.6]


# -------------------------------------------------------------------------------------------------------- probe curves


def test_accuracy_over_depth_has_mean_and_spread_over_seeds(tmp_path: Path, shown: list[Figure]) -> None:
    runs = [write_run(tmp_path / f"{m}-{seed}", m, seed) for m in METHODS for seed in (0, 1, 2)]
    rows = drawn("stages", *runs, out=tmp_path / "out")
    assert len(rows) == 3 * 3 * 4
    (row,) = [row for row in rows if (row["method"], row["seed"], row["stage"]) == ("LoCo", "2", "layer4")]
    assert (row["depth"], float(row["accuracy"])) == ("3", 0.8 - 0.2 + 0.02)
    (panel,) = shown[0].axes
    means = [line.get_ydata()[-1] for line in panel.lines if len(line.get_ydata()) == 4]
    assert means == pytest.approx([81, 71, 61])
    band = panel.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((50, 82))  # 81 +- 1 at the top, nothing below
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["layer1", "layer2", "layer3", "layer4"]


def test_neighbours_and_encoders_of_no_run_are_drawn_too(tmp_path: Path) -> None:
    run = write_run(tmp_path / "loco", "loco")
    (tmp_path / "random").mkdir()
    results = json.loads((run / "knn_eval-digits.json").read_text()) | {"run": {}, "encoder": "pixels-random-0"}
    (tmp_path / "random/knn_eval-digits.json").write_text(json.dumps(results))
    rows = drawn("stages", tmp_path / "random", run, "--measure", "knn", out=tmp_path / "out")
    assert [row["method"] for row in rows[::4]] == ["LoCo", "random start"]
    assert float(rows[0]["accuracy"]) == 0.5


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def line_of(*argv: Any, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        figures.main([*map(str, argv)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_neighbours_of_any_number_are_drawn(tmp_path: Path, shown: list[Figure]) -> None:
    """By default the fewest that all runs were read out with."""
    runs = [write_run(tmp_path / method, method) for method in METHODS]
    for run in runs:
        rewrite(run / "knn_eval-digits.json", accuracy={"7": [0.3] * 4, "5": [0.2] * 4})
    rewrite(runs[0] / "knn_eval-digits.json", accuracy={"7": [0.3] * 4, "3": [0.1] * 4})
    rows = drawn("stages", *runs, "--measure", "knn", out=tmp_path / "out")
    assert {row["accuracy"] for row in rows} == {"0.3"}
    assert shown[0].axes[0].get_ylabel() == "7 nearest neighbours, top-1, %"
    rows = drawn("stages", *runs[1:], "--measure", "knn", "--k", "5", out=tmp_path / "out")
    assert {row["accuracy"] for row in rows} == {"0.2"}


def test_a_run_read_out_twice_is_asked_for_by_data_or_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "loco", "loco")
    contents = json.loads((run / "linear_eval-fast-digits.json").read_text())
    other, early = run / "linear_eval-fast-cifar10.json", run / "linear_eval-fast-digits-checkpoint-3.json"
    other.write_text(json.dumps(contents | {"data": "cifar10", "accuracy": [0.1] * 4}))
    early.write_text(json.dumps(contents | {"checkpoint": "checkpoint-3", "accuracy": [0.2] * 4}))
    line = line_of("stages", run, capsys=capsys)
    assert line.endswith(": choose by --data, or give the file for the run")
    assert early.name not in line
    rows = drawn("stages", run, "--data", "cifar10", out=tmp_path / "out")
    assert {row["accuracy"] for row in rows} == {"0.1"}
    rows = drawn("stages", run, early, "--data", "digits", out=tmp_path / "out")
    assert [row["method"] for row in rows[::4]] == ["LoCo", "LoCo, checkpoint-3"]


def test_runs_of_different_data_are_not_drawn_on_one_axis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name, "loco", data=name) for name in ("digits", "cifar10")]
    rewrite(runs[1] / "linear_eval-fast-digits.json", data="cifar10")
    for figure, what in (("losses", "losses"), ("tsne", "vectors"), ("stages", "read-outs")):
        line = line_of(figure, *runs, capsys=capsys)
        assert line.startswith(f"error: {what} of different data do not go on one axis (")
        assert all(f"{run}: {run.name}" in line for run in runs)


@pytest.mark.parametrize("setting", ["lr", "batch_size", "image_size", "temperature"])
def test_what_else_differs_stands_in_the_names(setting: str, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(value), "loco", **{setting: value}) for value in (1, 2)]
    for figure in ("losses", "stages"):
        rows = drawn(figure, *runs, out=tmp_path / figure)
        name = setting.replace("_", " ")
        assert {row["method"] for row in rows} == {f"LoCo, {name} 1", f"LoCo, {name} 2"}


def test_an_overlap_that_follows_from_the_method_is_not_told(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / method, method, overlap=overlap) for overlap, method in enumerate(METHODS)]
    assert {row["method"] for row in drawn("losses", *runs, out=tmp_path / "out")} == set(figures.NAMES.values())


def test_a_run_of_one_line_is_drawn_as_points(tmp_path: Path, shown: list[Figure]) -> None:
    runs = [write_run(tmp_path / method, method) for method in METHODS]
    for run in runs:
        log = run / "log.jsonl"
        log.write_text(log.read_text().splitlines()[0] + "\n")
    drawn("losses", *runs, out=tmp_path / "out")
    for panel, units in zip(shown[0].axes, (1, 4 + 1, 3 + 1), strict=True):  # the end-to-end run's in the others, too
        assert sum(line.get_marker() == "o" for line in panel.lines) == units


def test_a_mean_of_runs_ends_where_the_shortest_does(tmp_path: Path, shown: list[Figure]) -> None:
    runs = [write_run(tmp_path / str(seed), "simclr", seed) for seed in (0, 1)]
    log = runs[1] / "log.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines()[:4]))
    drawn("losses", *runs, out=tmp_path / "out")
    assert {len(line.get_xdata()) for line in shown[0].axes[0].lines} == {4}


def test_a_stage_read_out_alone_is_drawn_at_its_depth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / method, method) for method in METHODS]
    rewrite(runs[0] / "linear_eval-fast-digits.json", stages=["layer4"], accuracy=[0.9])
    rows = drawn("stages", *runs, out=tmp_path / "out")
    assert (rows[0]["method"], rows[0]["stage"], rows[0]["depth"]) == ("SimCLR", "layer4", "3")
    rewrite(runs[0] / "linear_eval-fast-digits.json", stages=["blocks.3"])
    assert "others layer1, layer2, layer3, layer4: draw them apart" in line_of("stages", *runs, capsys=capsys)


def test_a_legend_names_what_is_drawn(tmp_path: Path, shown: list[Figure]) -> None:
    rows = [{"method": "LoCo", "peak_saving": 2, "saved_saving": 3, "saving_in_paper": None}]
    for k, setting in enumerate(({"arch": "a", "batch_size": 2}, {"arch": "a", "batch_size": 4})):
        (tmp_path / str(k)).mkdir()
        (tmp_path / str(k) / "memory.json").write_text(json.dumps({"setting": setting, "methods": rows}))
    drawn("memory", tmp_path / "0", tmp_path / "1", out=tmp_path / "out")
    (legend,) = shown[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["peak of all bytes alive", "kept for a backward"]
    assert [panel.get_title("left") for panel in shown[0].axes] == ["a, batch size 2", "a, batch size 4"]


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "the following arguments are required: FIGURE"),
        ("losses", "the following arguments are required: RUN"),
        ("losses nowhere", "nowhere is not a run of pretrain.py: it has no run.json, or not one of its own"),
        ("losses run", "run has no log.jsonl to draw from, or an empty one"),
        ("losses run/run.json", ".*run.json is not a run of pretrain.py: .*"),
        ("tsne run --data mnist", "unknown data set 'mnist': choose .*"),
        ("memory run", "run is not a directory that memory.py --out wrote: it has no memory.json, .*"),
        ("stages run --measure paper", "run is not read out by that measure yet: run linear_eval.py"),
        ("stages run --data cifar10", "run is not read out by that measure on cifar10 yet: run linear_eval.py"),
        (
            "stages run --measure knn --k 5",
            r"not all runs were read out with k = 5 \(run: 20, 200\): run knn_eval.py --k",
        ),
        ("stages run --out run/run.json", "cannot read or write run/run.json: File exists"),
    ],
)
def test_a_wrong_argument_is_one_line(
    argv: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"), "loco")
    Path("run/log.jsonl").unlink()
    with pytest.raises(SystemExit) as stopped:
        figures.main(argv.split())
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"error: {message}", line)
