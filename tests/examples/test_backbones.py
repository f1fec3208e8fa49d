"""Backbones by name: torchvision's, timm's, one's own file's; where they are cut, and how what they hand on is read out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the examples need the extra `examples`")
pytest.importorskip("timm")

import few_labels
import knn_eval
import linear_eval
import pretrain
import timm
from backbones import ARCHITECTURES, StageFeatures, architecture, cut
from inputs.image_sets import DataError
from pretraining import runs

OWN = """
import timm
from torchvision.models.resnet import BasicBlock, ResNet

def resnet():
    return ResNet(BasicBlock, [1, 1, 1, 1])

def vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, embed_dim=24, num_heads=2)

def broken():
    raise RuntimeError("of itself")

number = 7
"""
VIT = {"img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 24, "num_heads": 2}


@pytest.fixture(autouse=True)
def float32() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two shades of noise, in colour."""
    random = np.random.default_rng(0)
    labels = np.arange(24) % 2
    x = random.integers(0, 120, (24, 32, 32, 3), dtype=np.uint8) + (100 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(tmp_path / "noise.npz", x_train=x, y_train=labels, x_test=x[:8], y_test=labels[:8])
    return tmp_path / "noise.npz"


def arguments(data: Path, out: Path, arch: object, *more: str) -> list[str]:
    fixed = ["--batch-size", "8", "--epochs", "1", "--log-every", "1", "--device", "cpu"]
    return ["--data", str(data), "--arch", str(arch), *fixed, "--out", str(out), *more]


@pytest.mark.parametrize(
    ("function", "stages", "decoder"),
    [("resnet", ["layer1", "layer2", "layer3", "layer4"], "conv"), ("vit", None, "tokens")],
)
def test_a_backbone_of_ones_own_file_is_trained_and_read_out(
    function: str,
    stages: list[str] | None,
    decoder: str,
    own: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    assert pretrain.main(arguments(data, out, f"own.py:{function}")) == 0
    settings = json.loads((out / "run.json").read_text())
    assert settings["arch"] == f"{own}:{function}"  # found from elsewhere, too
    assert settings["decoder"] == decoder
    assert settings["stages"] == stages or (stages is None and len(settings["stages"]) == 4)
    assert pretrain.main([*arguments(data, out, f"{own}:{function}"), "--resume", "auto"]) == 0  # the same run

    monkeypatch.chdir("/")
    assert linear_eval.main([str(out), "--device", "cpu"]) == 0
    assert linear_eval.main([str(out), "--device", "cpu", "--protocol", "paper", "--epochs", "1", "--lr", "1"]) == 0
    assert knn_eval.main([str(out), "--device", "cpu", "--k", "3"]) == 0
    assert few_labels.main([str(out), "--percent", "50", "--epochs", "1", "--device", "cpu", "--scratch"]) == 0
    read = json.loads((out / "linear_eval-fast-noise.json").read_text())
    assert read["stages"] == settings["stages"]
    assert len(read["accuracy"]) == 4


def test_tokens_are_averaged_over_their_positions() -> None:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **VIT).eval()
    images, outlets = torch.rand(3, 3, 32, 32), []
    for block in (0, 3):
        vit.blocks[block].register_forward_hook(lambda module, args, outlet: outlets.append(outlet))
    found = StageFeatures(vit, ("blocks.0", "blocks.3"))(images)
    for vectors, outlet in zip(found, outlets[-2:], strict=True):
        assert outlet.shape == (3, 17, 24)
        assert torch.equal(vectors, outlet.mean(dim=1))


def test_stages_may_be_named(own: Path, data: Path, tmp_path: Path) -> None:
    argv = arguments(data, tmp_path / "run", f"{own}:resnet", "--stages", "layer2", "layer4", "--method", "simclr")
    assert pretrain.main(argv) == 0
    run = runs.load(tmp_path / "run")
    assert run.stages == ("layer2", "layer4")
    assert run.settings["overlap"] == 1


def test_the_known_ones_are_cut_where_they_always_were_and_others_in_four() -> None:
    assert cut("resnet18", 32) == (ARCHITECTURES["resnet18"], "conv")
    assert cut("resnet18", 32, ["layer2", "layer4"])[0].stages == ("layer2", "layer4")
    found, decoder = cut("torchvision:resnet18", 64)
    assert (len(found.stages), found.stages[-1], decoder) == (4, "layer4", "conv")
    assert cut("timm:resnet10t.c3_in1k", 32)[1] == "conv"
    with pytest.raises(DataError, match="there is no backbone 'resnet19'"):
        architecture("resnet19", ["layer1"])


@pytest.mark.parametrize(
    ("arch", "more", "message"),
    [
        ("resnet7", "", r"argument --arch: expected resnet18, .*; or torchvision:NAME, timm:NAME.*; did you mean .*"),
        ("own.py", "", "argument --arch: expected .*path/file.py:function, got 'own.py'"),
        ("nowhere.py:resnet", "", r"there is no file .*nowhere\.py"),
        ("own.py:restnet", "", "own.py has no function 'restnet' that returns a backbone; .*did you mean 'resnet'.*"),
        ("own.py:broken", "", r"own.py:broken\(\) cannot be made: RuntimeError: of itself"),
        ("own.py:number", "", "own.py has no function 'number' .*"),
        ("torchvision:resnet19", "", r"torchvision has no model 'resnet19'; did you mean .*"),
        ("timm:nothing_like_it", "", "timm has no model 'nothing_like_it'.*"),
        (
            "own.py:vit",
            "--image-size 48",
            r"own.py:vit, given a batch of shape \(64, 3, 48, 48\): .* Images of another size: --image-size",
        ),
        ("own.py:resnet", "--stages layer5 layer6", r"stages name submodules \['layer5', 'layer6'\] that ResNet .*"),
        ("own.py:resnet", "--stages layer4 layer2", ".*layer4.*"),
        ("own.py:vit", "--stages blocks.1 blocks.3 --decoder conv", ".*vit cannot be trained so: .*ConvMLPDecoder.*"),
    ],
)
def test_what_is_no_backbone_or_cannot_be_cut_is_one_line(
    arch: str,
    more: str,
    message: str,
    own: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        pretrain.main(arguments(data, tmp_path / "run", arch, *more.split()))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^error: (.*/)?{message}$", line), line


def test_detection_refuses_tokens_and_sizes_that_a_backbone_does_not_take() -> None:
    pytest.importorskip("torchmetrics")
    from pyramid import check_maps

    vit = timm.create_model("vit_tiny_patch16_224", **VIT)
    with pytest.raises(DataError, match=r"read maps \(N, C, H, W\); the stages of VisionTransformer hand on others"):
        check_maps(vit, ("blocks.1", "blocks.3"), 32)
    with pytest.raises(DataError, match="VisionTransformer does not run on"):
        check_maps(vit, ("blocks.1", "blocks.3"), 64)
