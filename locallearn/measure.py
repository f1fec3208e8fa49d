"""The old place of :mod:`locallearn.memory`; it will be gone in the next release."""

import warnings

from locallearn.memory import Cost, measure

__all__ = ["Cost", "measure"]

warnings.warn(
    "locallearn.measure has become locallearn.memory: from locallearn.memory import measure",
    DeprecationWarning,
    stacklevel=2,
)
