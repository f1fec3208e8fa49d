"""Several processes: rows of every rank gathered, gradients averaged."""

from locallearn.distributed.averages import average_gradients, covers_the_world
from locallearn.distributed.reducer import Reduction, StageReducer
from locallearn.distributed.rows import apart, gather, gather_with_gradient, in_use, is_apart, row_counts, world_size

__all__ = [
    "Reduction",
    "StageReducer",
    "apart",
    "average_gradients",
    "covers_the_world",
    "gather",
    "gather_with_gradient",
    "in_use",
    "is_apart",
    "row_counts",
    "world_size",
]
