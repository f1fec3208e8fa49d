"""What a step costs, counted exactly and predicted, and where to cut a backbone so that it costs little."""

from locallearn.memory.count import Cost, measure
from locallearn.memory.planning import StagePlan, plan_stages
from locallearn.memory.rule import stages_of

__all__ = ["Cost", "StagePlan", "measure", "plan_stages", "stages_of"]
