"""A rank that is lost, told in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")
NOBODY = -1  # the rank of an error where it is not known which one is lost


class PipelineError(RuntimeError):
    """A rank of the pipeline is lost, or hangs; every rank ends with this error.

    Attributes:
        rank: which one, as far as is known here, else -1.
    """

    def __init__(self, text: str, rank: int) -> None:
        super().__init__(f"{text}. Start all ranks again from the last checkpoint")
        self.rank = rank


def together(work: Callable[[], T], what: str, timeout: timedelta) -> T:
    """What all ranks do at once.

    Raises:
        PipelineError: if one of them does not come.
    """
    try:
        return work()
    except RuntimeError as error:
        raise PipelineError(
            f"a rank is lost, or has not come {what} for {timeout.total_seconds():.3g} s "
            f"(torch says: {str(error).strip().splitlines()[0]})",
            NOBODY,
        ) from error
