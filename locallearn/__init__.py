"""Train networks locally, stage by stage: LoCo, Greedy InfoMax and SimCLR on any PyTorch backbone."""

from locallearn.decoders import ConvMLPDecoder, MLPDecoder, TokenDecoder
from locallearn.losses import InfoNCE, info_nce
from locallearn.plan import Plan, Unit
from locallearn.planning import StagePlan, plan_stages
from locallearn.reporting import MemoryReport, memory_report
from locallearn.schedules import fused, sequential
from locallearn.sharing import Hard, Soft, UpperOnly
from locallearn.wrapper import LocalWrapper

__version__ = "0.1.0"

__all__ = [
    "ConvMLPDecoder",
    "Hard",
    "InfoNCE",
    "LocalWrapper",
    "MLPDecoder",
    "MemoryReport",
    "Plan",
    "Soft",
    "StagePlan",
    "TokenDecoder",
    "Unit",
    "UpperOnly",
    "fused",
    "info_nce",
    "memory_report",
    "plan_stages",
    "sequential",
]
