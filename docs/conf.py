"""Sphinx's settings: `sphinx-build -W docs docs/_build`."""

import sys
from pathlib import Path

import locallearn

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "locallearn"
author = "The locallearn authors"
copyright = "2026, the locallearn authors"
version = release = locallearn.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",  # links to the source
    "sphinx_copybutton",
    "example_pages",
    "offline_math",
]
html_math_renderer = "mathml"
copybutton_prompt_text = r">>> |\.\.\. "  # what is copied is the input, without prompts and answers
copybutton_prompt_is_regexp = True
highlight_language = "none"  # of a block that names none
exclude_patterns = ["_build", "_extensions"]
myst_heading_anchors = 3  # links to headings inside of a page
nitpicky = False  # torch's and einops' own docs are not fetched, so their names stay unlinked

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # nn.Module says nothing about our forward
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_title = f"locallearn {release}"
