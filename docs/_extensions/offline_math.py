"""Formulas as MathML, which browsers draw themselves: nothing is loaded from elsewhere."""

from __future__ import annotations

from typing import Any

from docutils.nodes import SkipNode, math, math_block
from latex2mathml.converter import convert
from sphinx.application import Sphinx


def inline(page: Any, node: math) -> None:
    page.body.append(convert(node.astext()))
    raise SkipNode


def block(page: Any, node: math_block) -> None:
    page.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True}
