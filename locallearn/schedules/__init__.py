"""When a plan is carried out: a schedule turns a plan into a sequence of actions."""

from locallearn.schedules.actions import Action, Forward, Schedule, Train, peak
from locallearn.schedules.fused import fused
from locallearn.schedules.sequential import sequential

__all__ = ["Action", "Forward", "Schedule", "Train", "fused", "peak", "sequential"]
