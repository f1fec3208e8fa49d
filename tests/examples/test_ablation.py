"""examples/decoder_depth.py and examples/sharing.py: the paper's rows, resumed row by row, with mean and spread."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="the examples need the extra `examples`")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
import ablation
import decoder_depth
import sharing
from pretraining import methods

TABLES = [decoder_depth.TABLE_4, sharing.TABLE_5]


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Instead of training: the arguments. A row's accuracy is 0.1 * seed, and 0.5 more for LoCo."""
    made: list[list[str]] = []

    def pretrain(argv: list[str]) -> int:
        made.append(argv)
        Path(argv[argv.index("--out") + 1]).mkdir(parents=True)
        return 0

    def read_out(argv: list[str]) -> int:
        run = Path(argv[0])
        accuracy = 0.1 * int(run.name.removeprefix("seed-")) + 0.5 * run.parent.name.startswith("loco")
        name = f"linear_eval-{'fast' if 'fast' in argv else 'paper'}-digits.json"
        (run / name).write_text(json.dumps({"accuracy": [0.9, accuracy]}))
        return 0

    monkeypatch.setattr(ablation.pretrain, "main", pretrain)
    monkeypatch.setattr(ablation.linear_eval, "main", read_out)
    return made


def two_rows(out: Path, *more: str) -> list[str]:
    return ["--rows", "gim_conv", "loco_conv", "--seeds", "2", "--out", str(out), *more]


def test_rows_are_those_of_the_paper() -> None:
    assert [row.paper for row in decoder_depth.TABLE_4.rows] == [
        *(65.7, 60.9, 65.6, 63.6, 65.1, 65.8, 65.8, 65.8, 67.1, 62.3, 66.2, 67.5)
    ]
    assert [row.paper for row in sharing.TABLE_5.rows] == [65.1, 65.3, 65.5, 66.0, 65.9, 64.8, 65.3, 66.2]
    assert {row.decoder for row in sharing.TABLE_5.rows} == {"conv+mlp4"}
    for table in TABLES:
        assert len({row.name for row in table.rows}) == len(table.rows)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.title)
def test_pretraining_knows_every_row(table: ablation.Ablation) -> None:
    for row in table.rows:
        assert row.method in methods.METHODS
        assert row.decoder in {*methods.DECODERS, *methods.DEPTHS}
        assert row.sharing in methods.SHARINGS


def test_mean_and_spread_over_seeds(tmp_path: Path, calls: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert decoder_depth.main(two_rows(tmp_path, "--epochs", "7")) == 0
    printed = " ".join(capsys.readouterr().out.split())
    gim, loco = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert gim["mean"] == pytest.approx(5)
    assert loco["mean"] == pytest.approx(55)
    assert gim["std"] == loco["std"] == pytest.approx(50**0.5)
    assert "65.1" in printed
    assert "55.0" in printed
    assert "digits, presnet_small, 7 epochs of batch 128, fast linear read-out" in printed
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(rows[1][f"seed {seed}"]) for seed in (0, 1)] == pytest.approx([50, 60])
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert [(argv[1], argv[7]) for argv in calls] == [("gim", "0"), ("loco", "0"), ("gim", "1"), ("loco", "1")]
    assert all(argv[8:10] == ["--epochs", "7"] for argv in calls)


def test_what_is_finished_is_not_run_again(tmp_path: Path, calls: list[list[str]]) -> None:
    decoder_depth.main(two_rows(tmp_path))
    first = (tmp_path / "results.json").read_text()
    calls.clear()
    (tmp_path / "loco_conv/seed-1/row.json").unlink()
    (tmp_path / "loco_conv/seed-1/linear_eval-fast-digits.json").unlink()
    (tmp_path / "loco_conv/seed-1").rmdir()
    assert decoder_depth.main(two_rows(tmp_path)) == 0
    assert [(argv[1], argv[7]) for argv in calls] == [("loco", "1")]
    assert (tmp_path / "results.json").read_text() == first


@pytest.mark.parametrize("table", TABLES, ids=["depth", "sharing"])
def test_a_table_fits_eighty_columns(
    table: ablation.Ablation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    results = [ablation.Results(row, {0: 100.0, 1: 10.0}) for row in table.rows]
    ablation.show(table, results, argparse.Namespace(pretraining=[], protocol="paper"))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
    assert all(row.name in printed for row in table.rows)


@pytest.mark.usefixtures("calls")
def test_runs_with_other_arguments_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoder_depth.main(two_rows(tmp_path))
    for other in (["--epochs", "9"], ["--protocol", "paper"]):
        with pytest.raises(SystemExit):
            decoder_depth.main(two_rows(tmp_path, *other))
        error = capsys.readouterr().err
        assert "gim_conv/seed-0 was run with other arguments: --method gim --decoder conv" in error
        assert error.count("\n") == 1


def test_an_interrupted_run_ends_the_script_and_says_how_to_go_on(
    tmp_path: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ablation.pretrain.main
    monkeypatch.setattr(ablation.pretrain, "main", lambda argv: 130 if "loco" in argv else train(argv))
    assert decoder_depth.main(two_rows(tmp_path)) == 130
    assert "go on with: python examples/decoder_depth.py --rows gim_conv loco_conv" in capsys.readouterr().err
    assert len(calls) == 1
    monkeypatch.setattr(ablation.pretrain, "main", train)
    assert decoder_depth.main(two_rows(tmp_path)) == 0
    assert len(calls) == 4


def test_device_and_protocol_reach_both_halves(
    tmp_path: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_outs: list[list[str]] = []
    read_out = ablation.linear_eval.main
    monkeypatch.setattr(ablation.linear_eval, "main", lambda argv: read_outs.append(argv) or read_out(argv))
    arguments = [
        "--rows",
        "loco_conv+mlp4",
        "--seeds",
        "1",
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    assert sharing.main([*arguments, "--protocol", "paper"]) == 0
    for argv in (calls[0], read_outs[0]):
        assert argv[argv.index("--device") + 1] == "cpu"
        assert argv[argv.index("--threads") + 1] == "1"
    assert read_outs[0][1:4] == ["--protocol", "paper", "--resume"]
    assert calls[0][calls[0].index("--arch") + 1] == "presnet_small-3"


@pytest.mark.parametrize("arguments", [["--seed", "3"], ["--decoder=mlp"], ["--over", "1"], ["--resume", "auto"]])
def test_what_the_rows_decide_cannot_be_given(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        sharing.main(arguments)
    assert stopped.value.code == 2
    assert f"{arguments[0].split('=')[0]}: this follows from the rows" in capsys.readouterr().err


def test_what_pretraining_does_not_know_is_refused_before_the_first_run(
    tmp_path: Path, calls: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        decoder_depth.main(two_rows(tmp_path, "--epoch-count", "3"))
    assert capsys.readouterr().err == "error: unrecognized arguments: --epoch-count 3\n"
    assert not calls


def test_a_tiny_table_is_really_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 16), ("test", 8)):
        labels = np.arange(n) % 2
        images = noise.integers(0, 128, (n, 16, 16, 3), dtype=np.uint8)
        images[labels == 1, :8] += 100
        arrays |= {f"x_{part}": images, f"y_{part}": labels}
    np.savez(tmp_path / "tiny.npz", **arrays)
    tiny = ["--data", f"npz:{tmp_path / 'tiny.npz'}", "--epochs", "1", "--batch-size", "8", "--arch", "presnet_small"]
    arguments = ["--rows", "loco_conv+mlp4", "--seeds", "2", "--device", "cpu", "--out", str(tmp_path / "out"), *tiny]
    assert sharing.main(arguments) == 0
    (row,) = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert set(row["seeds"]) == {"0", "1"}
    assert all(0 <= top1 <= 100 for top1 in row["seeds"].values())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*/*")}
    capsys.readouterr()
    assert sharing.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*/*")} == before
