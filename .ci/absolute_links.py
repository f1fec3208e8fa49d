"""Builds the description for PyPI from README.md: links and pictures that are relative there become absolute.

The repository's address stands in one place, `Repository` in pyproject.toml's `[project.urls]`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?://|#)([^)\s]+)\)")


def absolute(text: str, repository: str, version: str) -> str:
    """`text` with its relative Markdown links and pictures pointing into that version of the repository."""

    def one(match: re.Match[str]) -> str:
        picture, label, target = match.groups()
        at = f"{repository}/{'raw' if picture else 'blob'}/v{version}"
        return f"{picture}[{absolute(label, repository, version)}]({at}/{target})"

    return LINK.sub(one, text)


class AbsoluteLinks(MetadataHookInterface):
    """Hatchling calls it wherever metadata are made: for both distributions, and for an editable install."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = (Path(self.root) / "README.md").read_text()
        readme = absolute(text, metadata["urls"]["Repository"], metadata["version"])
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}
