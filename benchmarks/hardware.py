"""What a benchmark ran on, for the head of its page."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


def processor() -> str:
    """The CPU's name, as far as the system tells."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "a CPU")


def versions(*packages: str) -> str:
    """Of Python and of installed packages."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])


def machine(device: str, *packages: str) -> str:
    """What computes, and with which versions."""
    threads = f"{processor()}, {torch.get_num_threads()} threads on {os.cpu_count()} cores"
    return f"{torch.cuda.get_device_name() if device == 'cuda' else threads}, {versions('torch', *packages)}"


def commit() -> str:
    """The last one that changed the library."""
    asked = ["git", "-C", str(Path(__file__).parents[1]), "log", "-1", "--format=%h", "--", "locallearn"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
