"""Losses; usable with nothing else from this library."""

from locallearn.losses.contrastive import InfoNCE, info_nce

__all__ = ["InfoNCE", "info_nce"]
