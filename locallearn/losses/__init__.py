"""Losses; usable with nothing else from this library."""

from locallearn.losses.contrastive import info_nce
from locallearn.losses.criterion import InfoNCE

__all__ = ["InfoNCE", "info_nce"]
