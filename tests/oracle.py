"""``locallearn.testing`` in the short forms that tests use."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from locallearn import LocalWrapper
from locallearn.testing import local_gradients
from locallearn.testing.comparison import differences
from locallearn.testing.copies import gradients
from locallearn.testing.reference import graph

__all__ = ["assert_same", "gradients", "oracle", "weights_of"]


def oracle(model: LocalWrapper, *views: Tensor, targets: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The units' losses and every parameter's gradient; ``model`` and the random state stay as they were."""
    expected = local_gradients(model, *views, targets=targets)
    return expected.losses, expected.gradients


def weights_of(root: Tensor) -> list[Tensor]:
    """Every leaf that the graph of ``root`` reaches."""
    return graph(root)[0]


def assert_same(
    ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10, floor: float = 1e-6
) -> None:
    """Each gradient equal, relative to the larger of its norm and ``floor`` of the largest one's."""
    assert expected, "the oracle found nothing to compare"
    wrong = differences(ours, expected, tolerance, floor)
    assert not wrong, "; ".join(wrong.values())
