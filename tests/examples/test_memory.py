"""examples/memory.py and its counts: counts by hand, and every output at tiny size."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib", reason="the examples need the extra `examples`")
pytest.importorskip("rich")
import memory
from counting import step_costs
from counting.paper_counts import StageCount, paper_counts, shares


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.setenv("COLUMNS", "160")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False)
        self.downsample = nn.Sequential(nn.Conv2d(4, 6, 1, stride=2, bias=False), nn.BatchNorm2d(6))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.conv(maps) + self.downsample(maps)


def test_the_papers_count_by_hand() -> None:
    net = nn.Sequential()
    net.stem = nn.Conv2d(3, 4, 3, padding=1)
    net.one = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    net.two = nn.Sequential(Residual(), nn.Conv2d(6, 2, 1))
    net.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 10))
    first = StageCount(memory=4 * 64, flops=64 * (27 * 4 + 4 * 4 + 2 * 4))
    second = StageCount(memory=(6 + 2) * 16, flops=16 * (6 * 2 * 9 + 6 * 4 + 2 * 6 + 2 * 6))
    assert paper_counts(net, ("one", "two"), torch.zeros(1, 3, 8, 8)) == [first, second]
    assert not any(module._forward_hooks for module in net.modules())


def test_shares_are_percent_of_the_sum() -> None:
    assert shares([1, 3]) == [25, 75]


def test_what_several_stages_save_counts_once() -> None:
    kept = [torch.zeros(4).untyped_storage(), torch.zeros(8).untyped_storage()]
    both = {id(storage): storage for storage in kept}
    assert step_costs.size([both, {id(kept[0]): kept[0]}]) == 48


def test_weights_and_images_do_not_count_as_saved() -> None:
    saved = step_costs.Saved()
    layer, images = nn.Linear(4, 4), torch.zeros(2, 4)
    saved.ignore([images])
    saved.ignore_weights(layer)
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        layer(layer(images).relu())
    assert step_costs.size([saved.part]) == 2 * 4 * 4  # the ReLU's output, which the second product reads too


def test_the_decoders_width_is_capped_and_its_mlp_is_not() -> None:
    decoder = step_costs.narrow_decoder(512, 128)
    (block,) = decoder.blocks  # type: ignore[union-attr]
    assert block.branch[0].out_channels == 32
    assert [(m.in_features, m.out_features) for m in decoder.mlp if isinstance(m, nn.Linear)] == [
        (128, 512),
        (512, 128),
    ]  # type: ignore[union-attr]


def test_methods_are_every_overlap_with_and_without_recomputation() -> None:
    setting = step_costs.Setting("presnet50", decoder_width=128)
    rows = {(method.overlap, method.checkpoint) for method in step_costs.methods(setting) if method.block}
    every = {(overlap, checkpoint) for overlap in (None, 0, 1, 2, 3, 4) for checkpoint in (False, True)}
    assert rows == {*every, (1, step_costs.BLOCKS_AND_STAGES)}


def test_tables_and_files_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    all_methods = step_costs.methods(step_costs.Setting("presnet_small"))
    monkeypatch.setattr(memory, "methods", lambda setting: [*all_methods[:4], all_methods[-6]])
    arguments = [
        "--arch",
        "presnet_small",
        "--batch-size",
        "4",
        "--decoder-width",
        "16",
        "--out",
        str(tmp_path / "new"),
    ]
    assert memory.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "two views of 4 images of 32 pixels" in printed
    assert "block of at most 16 channels" in printed
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= 80
    written = json.loads((tmp_path / "new/memory.json").read_text())
    names = [row["method"] for row in written["methods"]]
    assert names[:4] == [
        "end-to-end, MLP decoder (SimCLR)",
        "end-to-end, block + MLP decoder",
        "LoCo (`overlap=1`)",
        "Greedy InfoMax (`overlap=0`)",
    ]
    assert names[4] == "LoCo, blocks recomputed"
    assert all(name.split("`, ")[0].split(" (")[0].strip("`") in printed for name in names)
    for row in written["methods"]:
        assert row["predicted_saved_bytes"] == pytest.approx(row["saved_bytes"], rel=0.03)
        assert row["peak_bytes"] >= row["saved_bytes"]
    for name in ("stages", "decoders", "methods"):
        with (tmp_path / f"new/{name}.csv").open() as file:
            assert len(list(csv.DictReader(file))) == len(written[name])
    assert (tmp_path / "new/memory.png").read_bytes().startswith(b"\x89PNG")


def test_the_papers_columns_stand_beside_ours() -> None:
    assert set(memory.PAPER_STAGES) == {"resnet50", "presnet50"}
    for arch, columns in memory.PAPER_STAGES.items():
        for column in columns:
            assert len(column) == len(step_costs.COUNTED[arch].stages)
            assert sum(column) == pytest.approx(100, abs=0.02)


def test_small_numbers_keep_three_digits() -> None:
    numbers = [0, 0.001234, 0.0996, 1.5, 27.14, 123.4, 12345.6]
    assert [memory.three_digits(n) for n in numbers] == ["0", "0.00123", "0.0996", "1.50", "27.1", "123", "12,346"]
    assert memory.megabytes(40_960) == "0.0410"


def test_markdown_is_the_readmes_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = [step_costs.Method("end-to-end", None, block=False), step_costs.Method("LoCo", 1, checkpoint=True)]
    monkeypatch.setattr(memory, "methods", lambda setting: few)
    memory.main(["--arch", "resnet18", "--batch-size", "2", "--image-size", "32", "--markdown"])
    head, rule, first, second = capsys.readouterr().out.splitlines()
    assert head == "| training | GFLOP | | peak, MB | less by | saved, MB | less by |"
    assert head.count("|") == rule.count("|") == first.count("|") == second.count("|")
    assert first.startswith("| end-to-end | ")
    assert "| 1.00x |" in first


def test_transformers_are_counted_too() -> None:
    setting = step_costs.Setting("vit_b_16", batch_size=2, image_size=32)
    gim, both = (step_costs.counted(setting, step_costs.Method("", overlap)) for overlap in (0, 3))
    assert gim.saved_bytes < both.saved_bytes
    assert memory.count_stages(setting)[-1].memory == 0  # no convolution, no map


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--arch", "vgg16"], "invalid choice: 'vgg16'"),
        (["--batch-size", "1"], "expected a whole number from 2 up, got '1'"),
        (["--arch", "vit_b_16", "--image-size", "100"], "patches of 16 pixels, got --image-size 100"),
        (
            ["--arch", "presnet_small", "--batch-size", "4", "--image-size", "8"],
            "--image-size 8 leaves a stage of presnet_small a single position, of which BatchNorm has no statistics",
        ),
    ],
)
def test_bad_arguments_get_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        memory.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
