"""``locallearn stages``, ``plan`` and ``check``: what they print, and what they say to mistakes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import list_models

import locallearn
from locallearn import LocalWrapper, MLPDecoder, plan_stages
from locallearn.command_line import main
from locallearn.command_line.parsing import memory, parsed
from locallearn.memory.predict import size

NETWORK = """
from torch import nn
def network():
    return nn.Sequential(*[nn.Conv2d(3 if k == 0 else 6, 6, 3, padding=1) for k in range(4)])
def number():
    return 3
def broken():
    raise RuntimeError("no weights")
class Wrong(nn.Sequential):
    def forward(self, images):
        return super().forward(images[:, :2])
def wrong():
    return Wrong(*network())
"""


@pytest.fixture(autouse=True)
def as_a_user_has_it() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(NETWORK)
    return str(tmp_path / "mine.py")


def network() -> nn.Module:
    scope: dict[str, Any] = {}
    exec(NETWORK, scope)
    return scope["network"]()


def told(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 0) -> str:
    assert main(argv) == status
    out, error = capsys.readouterr()
    assert bool(error) == (status == 2)
    return error or out


def numbers(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    return json.loads(told(capsys, *argv, "--json"))


def test_stages_are_the_places_of_the_planner(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = numbers(capsys, "stages", f"{file}:network", "--size", "16", "--batch", "8", "--decoder", "mlp")
    assert found["batch"] == [8, 3, 16, 16]
    pieces = plan_stages(network(), torch.zeros(8, 3, 16, 16), n=1, overlap=0, decoder=MLPDecoder).pieces[0]
    assert [(row["ends_after"], row["kept_bytes"], row["flops"]) for row in found["places"]] == [
        (piece.end, piece.kept, piece.flops) for piece in pieces
    ]
    assert [row["parameters"] for row in found["places"]] == [28 * 6, 55 * 6, 55 * 6, 55 * 6]
    assert found["places"][0]["outlet"] == [8, 6, 16, 16]


def test_the_line_that_plan_prints_runs(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("plan", f"{file}:network", "--size", "16", "--batch", "8", "--stages", "3", "--checkpoint")
    found = numbers(capsys, *argv)
    assert "checkpoint=True" in found["code"]
    scope = {"torch": torch, "LocalWrapper": LocalWrapper, "network": network}
    exec(found["code"], scope)
    model = scope["model"]
    assert list(model.stages) == found["stages"]
    assert [(unit.first, unit.last) for unit in model.plan.units] == [(0, 1), (1, 2)]
    expected = plan_stages(network(), torch.zeros(8, 3, 16, 16), n=3, checkpoint=True)
    assert found["peak_bytes"] == expected.peak(checkpoint=True)
    text = told(capsys, *argv)
    assert text.startswith(str(model.plan))
    assert text.endswith(found["code"] + "\n")
    assert f"predicted peak {size(found['peak_bytes'])} with blocks recomputed" in text


def test_a_budget_is_for_even_computation(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("plan", f"{file}:network", "--size", "16", "--batch", "8", "--stages", "3", "--decoder", "mlp")
    even = numbers(capsys, *argv, "--budget", "1GB")["stages"]
    expected = plan_stages(network(), torch.zeros(8, 3, 16, 16), n=3, budget=1e9, decoder=MLPDecoder)
    assert even == list(expected.stages)
    assert "the least is" in told(capsys, *argv, "--budget", "1KB", status=2)


def test_check_compares_every_gradient(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("check", f"{file}:network", "--size", "8", "--at", "0", "1", "3")
    found = numbers(capsys, *argv)
    assert found["ok"]
    assert found["dtype"] == "float64"
    names = [row["name"] for row in found["parameters"]]
    assert {f"backbone.{k}.weight" for k in range(4)} <= set(names)
    assert len(found["stages"]) == 3
    assert all(max(row["errors"].values()) < 1e-8 for row in found["parameters"])
    text = told(capsys, *argv)
    assert f"all {len(names)} gradients are those of one plain backward per unit" in text
    assert len(told(capsys, *argv, "--all").splitlines()) > len(text.splitlines())


def test_check_finds_a_gradient_that_is_wrong(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from locallearn._walk.gradients import Accumulate

    right = Accumulate.push

    def wrong(self: Accumulate, root: Any, weights: Sequence[Tensor], *rest: Any) -> Any:
        found = right(self, root, weights, *rest)
        for weight in weights[:1]:
            weight.grad *= 1.5
        return found

    monkeypatch.setattr(Accumulate, "push", wrong)
    argv = ("check", f"{file}:network", "--size", "8", "--at", "1", "2", "3")
    text = told(capsys, *argv, status=1)
    assert "NOT the gradients of one plain backward per unit" in text
    assert re.search(r"local_step: backbone\.\d\.\w+ has norm", text)
    assert main((*argv, "--json")) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert max(row["errors"]["local_step"] for row in found["parameters"]) == pytest.approx(0.5, rel=0.2)
    assert max(row["errors"]["loss.backward()"] for row in found["parameters"]) < 1e-8


def test_whatever_fails_in_a_check_is_no_gradient_that_differs(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise KeyError("of the\nbackbone")

    monkeypatch.setattr("locallearn.command_line.checking.prepared", fails)
    error = told(capsys, "check", f"{file}:network", "--size", "8", "--stages", "2", status=2)
    assert error == "locallearn check: error: KeyError: 'of the\\nbackbone'\n"


def test_backbones_of_others_are_found_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm", reason="the examples need the extra `examples`")
    found = numbers(capsys, "plan", "timm:vit_tiny_patch16_224", "--size", "32", "--batch", "4")
    assert found["decoder"] == "tokens"
    assert found["code"].startswith(
        'model = LocalWrapper(timm.create_model("vit_tiny_patch16_224", img_size=32), stages='
    )
    assert found["code"].endswith("overlap=1, decoder=TokenDecoder, example=torch.zeros(2, 3, 32, 32))")


@pytest.mark.filterwarnings("ignore")  # of transformers' own, which differ from release to release
def test_configurations_of_transformers_are_found_by_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason='comes with pip install -e ".[dev]"')
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    transformers.ViTConfig(image_size=32, patch_size=8, **shape).save_pretrained(tmp_path / "vit")
    found = numbers(capsys, "stages", f"hf:{tmp_path / 'vit'}", "--batch", "2")
    assert found["batch"] == [2, 3, 32, 32]
    assert sum("layer" in row["ends_after"] for row in found["places"]) >= 3
    transformers.BertConfig(vocab_size=50, **shape).save_pretrained(tmp_path / "bert")
    found = numbers(
        capsys,
        "check",
        f"hf:{tmp_path / 'bert'}",
        "--tokens",
        "6",
        "--at",
        "embeddings",
        "encoder.layer.1.output",
        "encoder.layer.2.output",
    )
    assert found["ok"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("stages", "torchvision:resnet5O"), "torchvision has no model 'resnet5O'; did you mean 'resnet50' or"),
        (("stages", "timm:convnext_tinyy"), "timm has no model 'convnext_tinyy'; did you mean 'convnext_tiny' or"),
        (("stages", "resnet50"), "for torchvision's, write torchvision:resnet50"),
        (("stages", "tim:resnet50"), "got 'tim:resnet50'; did you mean 'timm'?"),
        (("stages", "FILE"), r"which function of it\? Write .*mine.py:function"),
        (("stages", "no.py:f"), "there is no file no.py"),
        (("stages", "FILE:netwrk"), r"it has \['network', .*; did you mean 'network'\?"),
        (("stages", "FILE:number"), "returns a backbone, an nn.Module; it returned int"),
        (("stages", "FILE:broken"), "cannot be made: RuntimeError: no weights"),
        (
            ("stages", "FILE:wrong"),
            r"given a batch of shape \(64, 3, 224, 224\): .*expected input.* to have 3 channels",
        ),
        (
            ("stages", "FILE:network", "--channels", "4"),
            r"If it reads text, say --tokens 128.* --channels say which$",
        ),
        (("check", "FILE:network", "--channels", "4"), r"If it reads text, say --tokens 128.* --channels say which$"),
        (("check", "FILE:network", "--channels", "4", "--at", "0", "1"), r"If it reads text, .* --channels say which$"),
        (("check", "FILE:network", "--views", "1"), "--views is at least 2; got 1"),
        (("check", "FILE:network", "--batch", "1"), "--batch is at least 2; got 1"),
        (("plan", "FILE:network", "--save", "x.foo"), r"a picture is .*png.*; got 'x.foo', of the format '.foo'"),
        (("stages", "FILE:network", "--save", "x"), "without a suffix that says which"),
        (("plan", "FILE:network", "--stages", "9", "--size", "8"), "9 stages need as many pieces"),
        (("plan", "FILE:network", "--overlap", "4", "--size", "8"), "overlap=4 needs at least 5 stages"),
        (("check", "FILE:network", "--at", "0", "l2", "--size", "8"), r"has no submodules \['l2'\]"),
        (
            ("check", "FILE:network", "--at", "2", "0", "--size", "8"),
            "cannot be wrapped so: stages are listed in the order",
        ),
    ],
)
def test_mistakes_are_one_line(
    argv: tuple[str, ...], message: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if argv[1].startswith("timm:"):
        pytest.importorskip("timm", reason="the examples need the extra `examples`")
    error = told(capsys, *(word.replace("FILE", file) for word in argv), status=2)
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert error.startswith(f"locallearn {argv[0]}: error: ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("stagse", "x"), "did you mean 'stages'?"),
        (("plan", "x", "--ovrlap", "2"), "unrecognized arguments: --ovrlap 2; did you mean '--overlap'?"),
        (("plan", "x", "--decoder", "tokenz"), "did you mean 'tokens'?"),
        (("plan", "x", "--budget", "8XB"), "expected a number of bytes such as 8GB, 500MB or 1.5GiB, got '8XB'"),
        (("plan", "x", "--stages", "0"), "expected a whole number from 1 up, got '0'"),
        (("plan", "x", "--overlap", "-1"), "expected a whole number from 0 up, got '-1'"),
        (("check", "x", "--at", "0", "1", "--stages", "4"), "argument --stages: not allowed with argument --at"),
        (("check", "x", "--seed", "x"), "expected a whole number of at most 64 bits, got 'x'"),
        (("plan",), "the following arguments are required: BACKBONE"),
        ((), "say what to do: stages, plan, check"),
    ],
)
def test_wrong_usage_ends_with_2(argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    out, error = capsys.readouterr()
    assert not out
    assert message in error
    assert error.count("\n") == 1
    assert re.match(r"locallearn( plan| check)?: error: ", error)


@pytest.mark.parametrize(("spec", "package"), [("timm:resnet18", "timm"), ("hf:resnet", "transformers")])
def test_a_missing_package_is_named(
    spec: str, package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert f"which is not installed: pip install {package}" in told(capsys, "stages", spec, status=2)


def test_pictures_are_drawn_or_say_what_they_need(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = (f"{file}:network", "--size", "8", "--decoder", "mlp", "--save", str(tmp_path / "new" / "cuts.png"))
    for command in ("stages", "plan"):
        told(capsys, command, *argv)
        assert (tmp_path / "new" / "cuts.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "new" / "cuts.png").unlink()
        (tmp_path / "new").rmdir()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "--save draws with matplotlib, which is not installed: pip install matplotlib" in told(
        capsys, "plan", *argv, status=2
    )


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8e9), ("500mb", 5e8), ("1.5GiB", 1.5 * 2**30), ("8e9", 8e9), ("12", 12), ("2 TB", 2e12)]
)
def test_a_number_of_bytes(text: str, size: float) -> None:
    assert memory(text) == size


def test_it_runs_as_a_module_and_says_its_version() -> None:
    command = [sys.executable, "-m", "locallearn", "--version"]
    assert subprocess.check_output(command, text=True) == f"locallearn {locallearn.__version__}\n"


PAGE = (Path(__file__).parents[2] / "docs/command-line.md").read_text()


@pytest.mark.parametrize("line", re.findall(r"^locallearn (.*)$", PAGE, re.MULTILINE))
def test_commands_on_the_page_are_ones(line: str) -> None:
    args = parsed(line.split())
    assert args.command in ("stages", "plan", "check")
    if args.backbone.startswith("torchvision:"):
        assert args.backbone.partition(":")[2] in list_models()


def test_the_table_on_the_page_is_what_stages_prints(capsys: pytest.CaptureFixture[str]) -> None:
    printed = told(capsys, "stages", "torchvision:resnet50", "--size", "224").splitlines()
    shown = re.search(r"^can be cut after.*?(?=^```)", PAGE, re.MULTILINE | re.DOTALL)
    assert shown is not None
    lines = [line for line in shown[0].splitlines() if line != "..."]
    assert len(lines) == 6
    assert [line for line in lines if line not in printed] == []
