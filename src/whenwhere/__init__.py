"""Decide when and where a Transformer computes."""

from .attach import Attachment, attach
from .method import Method
from .methods import DeepCache, FewerSteps, GuidanceStop, TGate
from .plan import Plan
from .planning import plan

__all__ = [
    "Attachment",
    "DeepCache",
    "FewerSteps",
    "GuidanceStop",
    "Method",
    "Plan",
    "TGate",
    "attach",
    "plan",
]
