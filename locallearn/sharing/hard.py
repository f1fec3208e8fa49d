"""LoCo itself: a shared stage has one set of weights and gets every unit's gradient."""

from __future__ import annotations

from locallearn.sharing.base import Sharing


class Hard(Sharing):
    """Units share whole stages, and both gradients update them (Table 5, "Sharing 1 stage": 66.2)."""
