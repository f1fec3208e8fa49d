"""benchmarks/monitor.py prints what watching costs."""

from __future__ import annotations

import re

import monitor
import pytest
import torch


def test_it_prints_a_ratio_for_each_way_to_watch(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    monitor.main(["--batch", "2", "--size", "32", "--rows", "8", "--turns", "2"])
    rows = re.findall(r"^\| (.*?) \| (\d+\.\d+) \| \d+\.\d+ to \d+\.\d+ \|$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _ in rows] == [
        "`Monitor(every=1)`, ResNet-18, 2 images of 32 pixels",
        "the same, and `read()`",
        "`return_top1` alone: `info_nce` and its backward, 8 rows of 128 a view",
    ]
    assert all(float(ratio) > 0 for _, ratio in rows)
