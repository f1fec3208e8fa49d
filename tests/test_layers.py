"""The house: wings that import downwards only, and public names that are exactly these."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import locallearn

PACKAGE = Path(locallearn.__file__).parent
FLOORS = [  # what stands further down may import neither what stands above it nor what stands beside it
    {"__init__", "measure"},
    {"__main__"},
    {"command_line"},
    {"diagnosis", "pipeline"},
    {"testing"},
    {"wrapper"},
    {"memory"},
    {"_fitting"},
    {"_walk"},
    {"sharing", "schedules", "losses"},
    {"plan", "decoders", "distributed", "models"},
]
INSIDE = {  # likewise within a wing
    "command_line": [{"program"}, {"checking"}, {"cutting"}, {"parsing", "drawing"}, {"backbones"}, {"errors"}],
    "_walk": [
        {"local_pass"},
        {"cuts", "recompute", "isolation"},
        {"intercept", "replay"},
        {"writes"},
        {"sameness", "gradients"},
        {"segment"},
        {"engine"},
        {"undo", "hooks", "named", "trees", "uncompiled", "draws"},
    ],
    "_fitting": [
        {"attach", "recomputed"},
        {"chain", "objective", "parallel"},
        {"outlets"},
        {"channels", "quiet", "features", "batches"},
    ],
    "diagnosis": [
        {"gradients", "memory", "monitor", "quality", "similarity"},
        {"kept", "reading", "taps", "watch"},
        {"measures", "picture"},
    ],
    "pipeline": [
        {"pipeline"},
        {"neighbours"},
        {"fit", "wire"},
        {"trial"},
        {"part", "rank_pass", "owners", "messages", "norms", "state", "late", "lost"},
        {"share"},
    ],
    "distributed": [{"reducer"}, {"averages"}, {"rows"}],
    "memory": [
        {"planning"},
        {"predict", "rule", "balance"},
        {"pieces", "places"},
        {"scaled", "between"},
        {"count", "fakes"},
    ],
    "testing": [{"comparison"}, {"reference"}, {"copies"}],
}
ALONE = {"decoders": set(), "models": set(), "plan": set(), "distributed": set(), "losses": {"distributed"}}


def files(wing: str) -> list[Path]:
    """A top-level module, or all files of a package."""
    return [PACKAGE / f"{wing}.py"] if (PACKAGE / f"{wing}.py").exists() else sorted((PACKAGE / wing).rglob("*.py"))


def wings() -> list[str]:
    return sorted({path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")})


def imports(path: Path) -> list[list[str]]:
    """What a file imports from the library, as the parts of the names: ["wrapper"], ["_walk", "segment"]."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return [name.split(".")[1:] for name in sorted(names) if name.startswith("locallearn.")]


def levels(floors: list[set[str]]) -> dict[str, int]:
    return {name: level for level, names in enumerate(floors) for name in names}


@pytest.mark.parametrize("wing", wings())
def test_imports_only_point_down(wing: str) -> None:
    known = levels(FLOORS)
    assert wing in known, f"{wing} has no floor"
    for path in files(wing):
        for other, *_ in imports(path):
            assert other == wing or known[other] > known[wing], f"{path.name} imports {other}, which does not lie below"


@pytest.mark.parametrize("wing", INSIDE)
def test_imports_within_a_wing_only_point_down(wing: str) -> None:
    known = levels(INSIDE[wing])
    assert known.keys() == {path.stem for path in files(wing)} - {"__init__"}
    for path in files(wing):
        for other, *room in imports(path):
            if other == wing and path.stem != "__init__":
                assert room, f"{path.name} imports its own wing as a whole"
                assert known[room[0]] > known[path.stem], f"{path.name} imports {room[0]}, which does not lie below"


def test_there_are_few_arrows_between_the_wings() -> None:
    arrows = {(wing, other) for wing in wings() for path in files(wing) for other, *_ in imports(path) if other != wing}
    assert len(arrows) <= 60


@pytest.mark.parametrize("wing", ALONE)
def test_what_is_usable_by_itself_knows_nothing_of_the_rest(wing: str) -> None:
    assert {other for path in files(wing) for other, *_ in imports(path)} <= {wing, *ALONE[wing]}


def test_plans_and_schedules_import_no_torch() -> None:
    for path in [PACKAGE / "plan.py", *files("schedules")]:
        assert "torch" not in path.read_text().replace("no torch", ""), path


def test_what_counts_is_imported_only_where_it_is_asked_for() -> None:
    look = "import sys, locallearn; print(*[name for name in sys.modules if name.startswith('locallearn.')])"
    loaded = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True).stdout.split()
    assert "locallearn.wrapper" in loaded
    assert not {"memory", "diagnosis", "testing", "measure", "models"} & {name.split(".")[1] for name in loaded}


def test_the_old_path_of_measure_names_the_new_one() -> None:
    sys.modules.pop("locallearn.measure", None)
    with pytest.warns(DeprecationWarning, match="from locallearn.memory import measure"):
        from locallearn.measure import measure
    assert measure is locallearn.memory.measure


def test_the_public_names_are_exactly_these() -> None:
    assert set(locallearn.__all__) == {
        "ConvMLPDecoder",
        "Hard",
        "InfoNCE",
        "LocalWrapper",
        "MLPDecoder",
        "MemoryReport",
        "PlainConvDecoder",
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
        "stages_of",
    }
    assert all(hasattr(locallearn, name) for name in locallearn.__all__)


def test_public_names_have_docstrings_with_an_example_or_a_section() -> None:
    for name in locallearn.__all__:
        assert len(getattr(locallearn, name).__doc__.splitlines()[0]) > 20, name


def test_no_file_is_long() -> None:
    long = {path.name: n for path in PACKAGE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 300}
    assert not long
