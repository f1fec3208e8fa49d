"""What the extra `detection` brings, or one line that says how to have it: to import this is enough."""

from __future__ import annotations

import sys
from importlib.util import find_spec

PACKAGES = ("faster_coco_eval", "torchmetrics")

if missing := [name for name in PACKAGES if find_spec(name) is None]:
    packages = f"the package{'s' if len(missing) > 1 else ''} {' and '.join(missing)}"
    print(f'error: this needs {packages}, which come with: pip install -e ".[detection]"', file=sys.stderr)
    sys.exit(2)
