"""Train neural networks locally, stage by stage."""

from .losses import InfoNCE, info_nce

__all__ = ["InfoNCE", "info_nce"]
