"""The stages of one model on several processes, exact, without micro-batches and without a flush."""

from locallearn.pipeline.lost import PipelineError
from locallearn.pipeline.pipeline import Pipeline

__all__ = ["Pipeline", "PipelineError"]
