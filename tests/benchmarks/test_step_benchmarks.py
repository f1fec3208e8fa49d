"""benchmarks/local_step.py and many_units.py at tiny size: what is kept, what is drawn, what the page says of it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the examples need the extra `examples`")
pytest.importorskip("tqdm")
import local_step
import many_units
import overhead
import step_page
import steps
from networks import Network
from pareto import Point, draw, front
from steps import ROWS, Counts, Setting, Steps, largest_batch
from torch import nn

from locallearn import MLPDecoder

PNG = b"\x89PNG"
FEW = ["end-to-end", "offload", "caching-4", "loco"]


def chain() -> nn.Sequential:
    blocks = [nn.Sequential(nn.Conv2d(3 if s == 0 else 4, 4, 3, padding=1), nn.Tanh()) for s in range(4)]
    return nn.Sequential(*[nn.Sequential(block) for block in blocks])


SMALL = Network("Small", lambda size: chain(), tuple("0123"), partial(MLPDecoder, hidden=32), nn.Module.named_children)


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)


def test_the_largest_batch_is_where_weights_views_and_peak_fill_the_budget() -> None:
    few, many = (Counts(0, 1000 + 50_000 * images, 0, 300) for images in (4, 8))
    per_image = 50_000 + 2 * 3 * 4 * 10**2  # with two views of 10 pixels
    for images in (1, 20):
        exact = 1000 + 300 + images * per_image
        assert largest_batch((4, few), (8, many), 10, exact) == images
        assert largest_batch((4, few), (8, many), 10, exact - 1) == images - 1
    assert largest_batch((4, few), (8, many), 10, 100) == 0


def test_the_front_has_what_nothing_beats_in_both() -> None:
    points = [
        Point(name, "LoCo", *place) for name, place in {"a": (1, 4), "b": (2, 2), "c": (2, 3), "d": (3, 2)}.items()
    ]
    assert [point.name for point in front([*points, Point("e", "LoCo", 1, 1, competes=False)])] == ["a", "b"]


def test_steps_take_turns() -> None:
    turns: list[str] = []
    times = steps.interleaved({key: lambda key=key: turns.append(key) for key in "ab"}, 2, iter)  # type: ignore[misc]
    assert turns == ["a", "b"] * 3  # the first round warms up
    assert {key: len(found) for key, found in times.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_adds_gradients_to_all_that_its_plan_trains(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(steps.NETWORKS, "small", SMALL)
    setting = Setting("small", 4, 8, dtype)
    for row in ROWS.values():
        backbone = chain()
        made = Steps(setting, backbone, setting.images())
        model = made.model(row)
        made.step(row)()
        still = [name for name, weight in model.named_parameters() if not weight.grad.any()]  # type: ignore[union-attr]
        assert not still, row.name


def record(time: float, saved: int, own: float) -> dict[str, object]:
    def counts(saved: int) -> dict[str, int]:
        return {"flops": 100, "peak_bytes": 4 * saved, "saved_bytes": saved, "fits": 5}

    table = {
        "arch": "resnet50",
        "dtype": "float32",
        "compiled": False,
        "device": "cpu",
        "budget": 16,
        "counted": [32, 224],
        "timed": [8, 128, 3],
        "command": "",
        "machine": "",
        "processes": 1.0,
        "load": 1.0,
        "eager": {},
        "cuda_peak_bytes": {},
        "own_share": own,
        "times": {"end-to-end": [1.0, 1.0, 9.0], "loco": [time] * 3, "loco-checkpoint": [2.0], "blocks": [1.1]},
        "counts": {
            "end-to-end": counts(1000),
            "loco": counts(800),
            "loco-checkpoint": counts(saved),
            "blocks": counts(300),
        },
    }
    return {"tables": {"": table}, "overhead": {"stages": 4, "ours": 70.0, "by_hand": 50.0, "machine": "here"}}


def test_the_page_says_which_promises_hold_and_which_rivals_are_better() -> None:
    page = step_page.text(record(time=1.25, saved=250, own=0.002))
    assert "| ResNet-50: **LoCo** (`overlap=1`) at most 1.30x in time (cpu) | 1.25x | met |" in page
    assert "| ResNet-50: **LoCo**, `checkpoint=True` saves at least 3.5x less | 4.00x | met |" in page
    assert "| a stage of one weight at most 1.5x the calls by hand | 1.40x | met |" in page
    assert "missed" not in page
    assert "- Better than **LoCo** (`overlap=1`) in peak and time: end-to-end, blocks recomputed." in page
    page = step_page.text(record(time=1.35, saved=300, own=0.02))
    assert page.count("**missed**") == 3


def test_compiled_steps_stand_beside_eager_ones() -> None:
    both = record(time=1.25, saved=250, own=0.002)
    (table,) = both["tables"].values()
    table |= {"compiled": True, "eager": {key: [3.0] for key in table["times"]}}
    page = step_page.text(both)
    assert "## ResNet-50, fp32, compiled" in page
    assert "| training | ms |  | eager, ms | speed-up | GFLOP |" in page
    assert "| **LoCo** (`overlap=1`) | 1,250 | 1.25x | 3,000 | 2.40x |" in page


def test_what_is_measured_is_kept_and_not_counted_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(steps.NETWORKS, "small", SMALL)
    monkeypatch.setattr(local_step, "per_stage", lambda stages: (90.0, 50.0))
    sizes = ["--batch-size", "4", "--image-size", "66", "--count-batch-size", "8", "--count-image-size", "80"]
    arguments = [*sizes, "--repeats", "1", "--threads", "1", "--write", str(tmp_path), "--archs", "small"]
    arguments += ["--rows", *FEW]
    assert local_step.main(arguments) == 0
    assert "## Small, fp32" in capsys.readouterr().out
    kept = json.loads((tmp_path / "local_step.json").read_text())
    assert len(kept["counts"]) == 2 * len(FEW)
    assert (tmp_path / "local_step-small-float32.png").read_bytes().startswith(PNG)
    monkeypatch.setattr(local_step, "count", lambda *_: pytest.fail("counted again"))
    assert local_step.main([*arguments, "--budget", "1"]) == 0
    again = json.loads((tmp_path / "local_step.json").read_text())
    assert again["counts"] == kept["counts"]
    fits = [found["tables"]["small float32 eager cpu"]["counts"]["loco"]["fits"] for found in (kept, again)]
    assert fits[0] > fits[1] > 0


def test_labels_of_points_in_one_place_are_drawn(tmp_path: Path) -> None:
    draw([Point(name, "LoCo", 1, 0.5) for name in "ab"] + [Point("c", "SimCLR", 1, 1)], "title", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_overhead_is_measured_on_the_same_gradients() -> None:
    ours, by_hand = overhead.per_stage(stages=3, repeats=2)
    assert ours > 0
    assert by_hand > 0
    assert overhead.own_seconds(lambda: overhead.per_stage(3, 1)) > overhead.own_seconds(lambda: None) == 0


def test_memory_of_local_training_does_not_grow_with_the_number_of_units(tmp_path: Path) -> None:
    small = ["--channels", "4", "--image-size", "8", "--batch-size", "2", "--repeats", "1", "--threads", "1"]
    assert many_units.main(["--stages", "4", "8", *small, "--write", str(tmp_path)]) == 0
    four, eight = json.loads((tmp_path / "many_units.json").read_text())["rows"]
    for method in ("LoCo", "Greedy InfoMax"):
        assert (
            eight["peak_bytes"][method] - four["peak_bytes"][method] == 4 * 4
        )  # what four losses more are returned in
    assert eight["peak_bytes"]["SimCLR"] > 1.7 * four["peak_bytes"]["SimCLR"]
    assert (tmp_path / "many_units.png").read_bytes().startswith(PNG)
    page = (tmp_path / "many_units.md").read_text()
    assert "from 4 to 8" in page
    assert f"| {eight['milliseconds']['LoCo']:.2f} | {eight['peak_bytes']['LoCo'] / 1e6:.1f} |\n" in page


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--rows", "sgd"], "invalid choice: 'sgd'"),
        (["--archs", "vit_s", "--image-size", "100"], "vit_s takes patches of 16 pixels, got images of 100"),
        (["--budget", "0"], "expected a number above 0, got '0'"),
    ],
)
def test_bad_arguments_get_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        local_step.main(arguments)
    assert stopped.value.code == 2
    assert line in capsys.readouterr().err
