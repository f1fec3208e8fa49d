"""Looks at a wrapper from outside: what a step of it takes, and where; what its gradients, features and units do."""

from locallearn.diagnosis.gradients import GradientAgreement, gradient_agreement
from locallearn.diagnosis.measures import effective_rank, spread
from locallearn.diagnosis.memory import MemoryReport, memory_report
from locallearn.diagnosis.monitor import Monitor
from locallearn.diagnosis.quality import StageQuality, stage_quality
from locallearn.diagnosis.similarity import StageSimilarity, linear_cka
from locallearn.diagnosis.watch import DivergedError, Watch

__all__ = [
    "DivergedError",
    "GradientAgreement",
    "MemoryReport",
    "Monitor",
    "StageQuality",
    "StageSimilarity",
    "Watch",
    "effective_rank",
    "gradient_agreement",
    "linear_cka",
    "memory_report",
    "spread",
    "stage_quality",
]
