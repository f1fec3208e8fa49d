"""What README.md and docs/ say is true: their Python runs, their links lead somewhere, their commands are those of CI."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision import models

from locallearn import ConvMLPDecoder, LocalWrapper, TokenDecoder

ROOT = Path(__file__).parent.parent
MADE = ROOT / "docs/examples"  # by Sphinx, from examples/
PAGES = sorted(page for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")] if MADE not in page.parents)
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)#\s]+)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snippets run as a reader's do, in single precision, and leave no file behind."""
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("page", [page for page in PAGES if SNIPPET.search(page.read_text())], ids=name)
def test_snippets_run_in_the_order_of_the_page(page: Path) -> None:
    text = page.read_text()
    namespace: dict[str, object] = {"__name__": page.stem}
    for snippet in SNIPPET.finditer(text):
        above = text.count("\n", 0, snippet.start(1))
        exec(compile("\n" * above + snippet[1], str(page), "exec"), namespace)  # a traceback shows the page's line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_to_files_lead_to_files(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if MADE not in (page.parent / link).parents]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_every_page_has_its_place_in_the_contents() -> None:
    contents = (ROOT / "docs/index.md").read_text()
    lists = re.findall(r"^```\{toctree\}\n(?::.*\n)*([^`]*)^```$", contents, re.MULTILINE)
    docs = ROOT / "docs"
    pages = [page for kind in ("md", "rst") for page in docs.rglob(f"*.{kind}") if MADE not in page.parents]
    names = {str(page.relative_to(docs).with_suffix("")) for page in pages}
    assert sorted("".join(lists).split()) == sorted(names - {"index"} | {"examples/index"})


CUTS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "torchvision ResNet": (models.resnet18, [f"layer{k}" for k in range(1, 5)]),
    "torchvision RegNet": (models.regnet_y_400mf, [f"trunk_output.block{k}" for k in range(1, 5)]),
    "torchvision ShuffleNet": (models.shufflenet_v2_x0_5, ["stage2", "stage3", "conv5"]),
    "torchvision ConvNeXt": (models.convnext_tiny, [f"features.{k}" for k in (1, 3, 5, 7)]),
    "torchvision Swin": (models.swin_t, [f"features.{k}" for k in (1, 3, 5, 7)]),
    "torchvision DenseNet": (
        models.densenet121,
        [*(f"features.transition{k}" for k in range(1, 4)), "features.norm5"],
    ),
    "torchvision EfficientNet": (models.efficientnet_b0, [f"features.{k}" for k in (2, 3, 5, 8)]),
    "torchvision ViT": (models.vit_b_32, [f"encoder.layers.encoder_layer_{k}" for k in (2, 5, 8, 11)]),
    "timm ResNet": (lambda: timm.create_model("resnet18"), [f"layer{k}" for k in range(1, 5)]),
    "timm ConvNeXt": (lambda: timm.create_model("convnext_atto"), [f"stages.{k}" for k in range(4)]),
    "timm Swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224"),
        [f"layers.{k}" for k in range(4)],
    ),
    "timm ViT": (lambda: timm.create_model("vit_tiny_patch16_224"), [f"blocks.{k}" for k in (2, 5, 8, 11)]),
}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("backbone", CUTS)
def test_cuts_that_the_docs_advise_hold(backbone: str) -> None:
    make, stages = CUTS[backbone]
    page = (ROOT / "docs/your-backbone.md").read_text()
    assert f"`{stages[0]}`" in page
    assert f"`{stages[-1]}`" in page.replace("`..._", "`encoder.layers.encoder_layer_")
    LocalWrapper(make(), stages, decoder=TokenDecoder if "ViT" in backbone else ConvMLPDecoder)


@pytest.mark.usefixtures("elsewhere")
def test_counted_figures_are_those_that_memory_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="the examples need the extra `examples`")
    monkeypatch.syspath_prepend(ROOT / "examples")
    from counting.step_costs import DECODER_WIDTHS, Setting, counted, methods

    tables = re.findall(
        r"^<!-- examples/memory.py --arch (\w+) -->\n.*?\n\|---.*?\n(.*?)^<!-- end -->$",
        "".join(page.read_text() for page in PAGES),
        re.MULTILINE | re.DOTALL,
    )
    assert sorted(arch for arch, _ in tables) == ["presnet50", "resnet50", "resnet50", "vit_b_16"]
    assert len({table for arch, table in tables if arch == "resnet50"}) == 1
    for arch, table in set(tables):
        tolerance = (
            0.08 if "vit" in arch else 0.01
        )  # torch 2.6 has another attention, and does not count its FLOPs on a CPU
        setting = Setting(arch, decoder_width=DECODER_WIDTHS.get(arch))
        known = {method.name: method for method in methods(setting)}
        for line in table.splitlines():
            name, *cells = (cell.strip() for cell in line.split("|")[1:-1])
            cost = counted(setting, known[name])
            gflop, peak, saved = (float(cells[column].replace(",", "")) for column in (0, 2, 4))
            assert gflop == pytest.approx(cost.flops / 1e9, rel=tolerance)
            assert peak == pytest.approx(cost.peak_bytes / 1e6, rel=tolerance)
            assert saved == pytest.approx(cost.saved_bytes / 1e6, rel=tolerance)


@pytest.mark.usefixtures("elsewhere")
def test_the_memory_report_is_what_its_snippet_prints() -> None:
    page = (ROOT / "docs/how-it-works.md").read_text()
    found = re.search(
        r"(from torchvision.models import resnet50\n.*?)^```\n\n```\n(.*?)^```$", page, re.MULTILINE | re.DOTALL
    )
    assert found is not None
    namespace: dict[str, Any] = {"torch": torch, "LocalWrapper": LocalWrapper}
    exec(found[1], namespace)
    named, printed = (
        [re.split("  +", line.strip()) for line in text.splitlines()] for text in (found[2], str(namespace["report"]))
    )
    assert [name for name, *_ in named] == [name for name, *_ in printed]
    for (*_, shown, _), (*_, counted, _) in zip(named[1:], printed[1:], strict=True):
        assert float(shown.replace(",", "")) == pytest.approx(float(counted.replace(",", "")), rel=0.01)
