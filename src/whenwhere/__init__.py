"""Decide when and where a Transformer computes."""

from .attach import Attachment, attach
from .method import Method
from .methods import FORA, DeepCache, DeltaDiT, FewerSteps, GuidanceStop, SkipCache, TGate
from .plan import Plan
from .planning import plan

__all__ = [
    "FORA",
    "Attachment",
    "DeepCache",
    "DeltaDiT",
    "FewerSteps",
    "GuidanceStop",
    "Method",
    "Plan",
    "SkipCache",
    "TGate",
    "attach",
    "plan",
]
