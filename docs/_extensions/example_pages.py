"""Makes a page of every script in examples/, and one of each README there, when the docs are built.

A script's page is its own docstring and its own source, so that none can differ from the script.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
READMES = {"README.md": "index", "detection/README.md": "detection/index"}
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)(#[^)\s]*)?\)")


def scripts() -> list[Path]:
    """Those that are run, in the order in which the READMEs name them."""
    named = "".join((EXAMPLES / readme).read_text() for readme in READMES)
    paths = [path for path in sorted(EXAMPLES.rglob("*.py")) if '__name__ == "__main__"' in path.read_text()]
    return sorted(paths, key=lambda path: named.find(path.name) % len(named))  # those not named, -1, come last


def page_of(script: Path) -> str:
    """The script's docstring, the file to take along, and its source."""
    name = script.relative_to(ROOT).as_posix()
    source = Path(*[".."] * len(script.relative_to(ROOT).parts), name).as_posix()
    text = ast.get_docstring(ast.parse(script.read_text())) or ""
    take = f"Download {{download}}`{script.name} <{source}>`."
    show = f"```{{literalinclude}} {source}\n:language: python\n```"
    return f"# {script.relative_to(EXAMPLES).as_posix()}\n\n{text}\n\n{take}\n\n{show}\n"


def readme(path: Path, page: Path, listed: list[str]) -> str:
    """What a README's page says: its links lead to pages where there are such, and what is listed stands below."""
    made = {(EXAMPLES / name).resolve(): f"{stem}.md" for name, stem in READMES.items()}
    made |= {script.resolve(): script.relative_to(EXAMPLES).with_suffix(".md").as_posix() for script in scripts()}

    def one(match: re.Match[str]) -> str:
        target = (path.parent / match[1]).resolve()
        there = ROOT / "docs/examples" / made[target] if target in made else target
        return f"]({Path(os.path.relpath(there, page.parent)).as_posix()}{match[2] or ''})"

    contents = "\n".join(listed)
    return f"{LINK.sub(one, path.read_text())}\n```{{toctree}}\n:caption: Scripts\n\n{contents}\n```\n"


def write_pages(app: Sphinx) -> None:
    """All of them, into the folder `examples` beside the other pages."""
    folder = Path(app.srcdir) / "examples"
    shutil.rmtree(folder, ignore_errors=True)
    names = [script.relative_to(EXAMPLES).with_suffix("").as_posix() for script in scripts()]
    for script, name in zip(scripts(), names, strict=True):
        page = folder / f"{name}.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(page_of(script))
    below = [name.removeprefix("detection/") for name in names if name.startswith("detection/")]
    above = [name for name in names if not name.startswith("detection/")]
    for (name, stem), listed in zip(READMES.items(), ([*above, "detection/index"], below), strict=True):
        page = folder / f"{stem}.md"
        page.write_text(readme(EXAMPLES / name, page, listed))


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True}
