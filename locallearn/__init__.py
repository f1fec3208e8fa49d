"""Train networks locally, stage by stage: LoCo, Greedy InfoMax and SimCLR on any PyTorch backbone."""

from locallearn.decoders import ConvMLPDecoder, MLPDecoder, TokenDecoder
from locallearn.losses import InfoNCE, info_nce
from locallearn.plan import Plan, Unit
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
    "Plan",
    "Soft",
    "TokenDecoder",
    "Unit",
    "UpperOnly",
    "fused",
    "info_nce",
    "sequential",
]
