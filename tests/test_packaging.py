"""What is installed is light to import, typed, and says which version it is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import locallearn

ROOT = Path(__file__).parent.parent
HEAVY = {"torchvision", "sympy", "torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.utils.data"}


def imported_after_torch(statement: str) -> set[str]:
    """The modules that ``statement`` loads in a fresh interpreter that already has torch."""
    program = f"import sys, json, torch; known = set(sys.modules); {statement}; print(json.dumps([*(set(sys.modules) - known)]))"
    return set(json.loads(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT)))


@pytest.mark.skipif(torch.__version__ < "2.8", reason="torch.utils.checkpoint loads sympy there, as seen in torch 2.6")
@pytest.mark.parametrize("statement", ["import locallearn", "from locallearn import InfoNCE"])
def test_import_loads_nothing_but_itself_and_einops(statement: str) -> None:
    loaded = imported_after_torch(statement)
    assert {"locallearn", "locallearn.losses"} <= loaded
    assert {module.split(".")[0] for module in loaded} - sys.stdlib_module_names <= {"locallearn", "einops", "torch"}
    assert not {heavy for heavy in HEAVY for module in loaded if module == heavy or module.startswith(f"{heavy}.")}


def test_a_heavy_import_would_be_seen() -> None:
    assert "torchvision" in imported_after_torch("import torchvision")


def test_version_is_the_same_everywhere() -> None:
    for file, pattern in [
        ("pyproject.toml", r'^version = "(.+)"$'),
        ("CITATION.cff", r"^version: (.+)$"),
        ("CHANGELOG.md", r"^## \[(\d.+)\]"),
    ]:
        found = re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)
        assert found is not None, file
        assert found[1] == locallearn.__version__, file


def test_wheel_holds_the_typed_package_the_licence_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hatchling = pytest.importorskip("hatchling.build", reason='comes with pip install -e ".[dev]"')
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / hatchling.build_wheel(str(tmp_path))) as wheel:
        names = set(wheel.namelist())
        scripts = wheel.read(f"locallearn-{locallearn.__version__}.dist-info/entry_points.txt").decode()
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "locallearn").rglob("*.py")}
    info = f"locallearn-{locallearn.__version__}.dist-info"
    described = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert scripts.split() == ["[console_scripts]", "locallearn", "=", "locallearn.command_line:main"]
    assert names == sources | {"locallearn/py.typed"} | described
