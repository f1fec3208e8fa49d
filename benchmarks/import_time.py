"""What `import locallearn` costs over `import torch`, in milliseconds: the smallest of several fresh interpreters.

python benchmarks/import_time.py
"""

from __future__ import annotations

import subprocess
import sys

RUNS = 7
PROBE = """
import time
import torch
start = time.perf_counter()
import locallearn
print(1000 * (time.perf_counter() - start))
"""

times = sorted(float(subprocess.check_output([sys.executable, "-c", PROBE])) for _ in range(RUNS))
print(f"import locallearn, over import torch: {times[0]:.1f} ms (smallest of {RUNS}; median {times[RUNS // 2]:.1f} ms)")
