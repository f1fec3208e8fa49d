"""Train networks locally, stage by stage: LoCo, Greedy InfoMax and SimCLR on any PyTorch backbone."""

from importlib import import_module
from typing import TYPE_CHECKING

from locallearn.decoders import ConvMLPDecoder, MLPDecoder, PlainConvDecoder, TokenDecoder
from locallearn.losses import InfoNCE, info_nce
from locallearn.plan import Plan, Unit
from locallearn.schedules import fused, sequential
from locallearn.sharing import Hard, Soft, UpperOnly
from locallearn.wrapper import LocalWrapper

if TYPE_CHECKING:
    from locallearn.diagnosis import MemoryReport, memory_report
    from locallearn.memory import StagePlan, plan_stages, stages_of

__version__ = "0.2.0"

__all__ = [
    "ConvMLPDecoder",
    "Hard",
    "InfoNCE",
    "LocalWrapper",
    "MLPDecoder",
    "MemoryReport",
    "PlainConvDecoder",
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
    "stages_of",
]

# What counts needs fake tensors and torch's formulas for FLOPs, which take ten times as long to import as all the rest.
_LATER = {
    "MemoryReport": "locallearn.diagnosis",
    "StagePlan": "locallearn.memory",
    "memory_report": "locallearn.diagnosis",
    "plan_stages": "locallearn.memory",
    "stages_of": "locallearn.memory",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(_LATER[name]), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
