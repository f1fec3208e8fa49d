"""`.ci/release` refuses what is not ready, and the description for PyPI leads somewhere."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
ADDRESS = "https://example.org/team/locallearn"

if not (ROOT / ".ci/release").exists():
    pytest.skip("not a checkout", allow_module_level=True)


def loaded(name: str) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(Path(name).stem, str(ROOT / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


release = loaded(".ci/release")
links = loaded(".ci/absolute_links.py")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository that is ready."""
    for file in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md"):
        shutil.copy(ROOT / file, tmp_path)
    (tmp_path / "locallearn").mkdir()
    shutil.copy(ROOT / "locallearn/__init__.py", tmp_path / "locallearn")
    edit(tmp_path / "pyproject.toml", "https://github.com/OWNER/locallearn", ADDRESS)
    run = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*run, *command], check=True)
    return tmp_path


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert re.search(old, text, re.MULTILINE)
    file.write_text(re.sub(old, new, text, count=1, flags=re.MULTILINE))


def test_a_tree_that_is_ready_has_nothing_unset(tree: Path) -> None:
    assert release.unset(tree) == []


def test_the_placeholder_is_refused(tree: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tree)
    assert "placeholder" in release.unset(tree)[0]


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("CHANGELOG.md", r"^## \[\d.*$", "## [Unreleased]", r"begins with \[Unreleased\]"),
        ("CHANGELOG.md", r"^(## \[\d.*\]).*$", r"\1", "has no date"),
        ("CITATION.cff", r"^date-released: .*$", "date-released: 1999-01-01", "date-released is not the changelog's"),
        ("CITATION.cff", r"^version: .*$", "version: 9", "version is not pyproject.toml's"),
        ("locallearn/__init__.py", r"^__version__ = .*$", '__version__ = "9"', "__version__ is not pyproject.toml's"),
        ("CITATION.cff", r"^title", "title ", "1 files differ"),
    ],
)
def test_what_disagrees_is_told(tree: Path, file: str, old: str, new: str, told: str) -> None:
    edit(tree / file, old, new)
    assert any(re.search(told, sentence) for sentence in release.unset(tree))


def test_a_version_that_is_tagged_elsewhere_is_refused(tree: Path) -> None:
    version = re.search(r'^version = "(.+)"', (tree / "pyproject.toml").read_text(), re.MULTILINE)[1]  # type: ignore[index]
    git = ["git", "-C", str(tree), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "tag", f"v{version}"], check=True)
    assert release.unset(tree) == []
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "more"], check=True)
    assert "is on another commit" in release.unset(tree)[0]


def test_relative_links_and_pictures_become_absolute() -> None:
    text = "[a](docs/a.md#b) ![p](docs/p.png) [![x](y.svg)](LICENSE) [far](https://example.org) [here](#there)"
    assert links.absolute(text, ADDRESS, "1.0") == (
        f"[a]({ADDRESS}/blob/v1.0/docs/a.md#b) ![p]({ADDRESS}/raw/v1.0/docs/p.png) "
        f"[![x]({ADDRESS}/raw/v1.0/y.svg)]({ADDRESS}/blob/v1.0/LICENSE) [far](https://example.org) [here](#there)"
    )


def test_the_readme_has_no_relative_link_on_pypi() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(release.misdescribed(b"Name: x\n\n" + readme.encode())) > 10
    assert not release.misdescribed(b"Name: x\n\n" + links.absolute(readme, ADDRESS, "1.0").encode())
