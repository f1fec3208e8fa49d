"""The page "Using the loss alone" runs as it stands."""

import re
from pathlib import Path


def test_every_snippet_runs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "infonce.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 8
    exec("\n".join(snippets), {})
