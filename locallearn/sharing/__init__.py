"""How neighbouring units share a stage: the rows of Table 5 of the LoCo paper."""

from locallearn.sharing.base import Sharing
from locallearn.sharing.hard import Hard
from locallearn.sharing.soft import Soft
from locallearn.sharing.upper_only import UpperOnly

__all__ = ["Hard", "Sharing", "Soft", "UpperOnly"]
