"""The stages of one model on several processes, exact, without micro-batches and without a flush."""

from locallearn.pipeline.pipeline import Pipeline
from locallearn.pipeline.wire import PipelineError

__all__ = ["Pipeline", "PipelineError"]
