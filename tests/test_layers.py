"""Imports only point down, and the public names are exactly these."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import locallearn

PACKAGE = Path(locallearn.__file__).parent
LAYERS = [  # what stands further down may not import what stands above it, or beside it
    {"__init__", "models"},
    {"reporting", "testing"},
    {"wrapper"},
    {"planning"},
    {"_predict"},
    {"_pieces"},
    {"_engine", "_attach", "_policy"},
    {"_chain"},
    {"_shapes", "measure"},
    {"sharing", "_cuts", "_isolation", "_quiet"},
    {"_recompute"},
    {"_replay"},
    {"schedules", "_segment", "_gradients", "_objective", "_gates", "_sameness", "decoders", "losses"},
    {"distributed", "_undo", "_fakes"},
    {"plan"},
]
STANDALONE = {"decoders": set(), "models": set(), "losses": {"distributed"}, "measure": {"losses"}}


def modules() -> dict[str, list[Path]]:
    """Every top-level module or package of the library with its files."""
    found: dict[str, list[Path]] = {}
    for path in PACKAGE.rglob("*.py"):
        found.setdefault(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(path)
    return found


def imports(path: Path) -> set[str]:
    """The parts of the library that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("locallearn.")}


@pytest.mark.parametrize("module", modules())
def test_imports_only_point_down(module: str) -> None:
    levels = {name: level for level, names in enumerate(LAYERS) for name in names}
    assert module in levels, f"{module} has no place among the layers"
    for path in modules()[module]:
        for imported in imports(path) - {module}:
            assert levels[imported] > levels[module], f"{path.name} imports {imported}, which does not lie below"


@pytest.mark.parametrize("module", STANDALONE)
def test_losses_and_decoders_know_nothing_of_stages(module: str) -> None:
    assert set().union(*(imports(path) for path in modules()[module])) <= {module, *STANDALONE[module]}


def test_the_public_names_are_exactly_these() -> None:
    assert set(locallearn.__all__) == {
        "ConvMLPDecoder",
        "Hard",
        "InfoNCE",
        "LocalWrapper",
        "MLPDecoder",
        "MemoryReport",
        "Plan",
        "Soft",
        "StagePlan",
        "TokenDecoder",
        "Unit",
        "UpperOnly",
        "fused",
        "info_nce",
        "memory_report",
        "plan_stages",
        "sequential",
    }
    assert all(hasattr(locallearn, name) for name in locallearn.__all__)


def test_public_names_have_docstrings_with_an_example_or_a_section() -> None:
    for name in locallearn.__all__:
        assert len(getattr(locallearn, name).__doc__.splitlines()[0]) > 20, name


def test_no_file_is_long() -> None:
    long = {path.name: n for path in PACKAGE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 300}
    assert not long
