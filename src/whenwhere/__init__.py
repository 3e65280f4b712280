"""Decide when and where a Transformer computes."""

from .attach import Attachment, attach
from .calibration import Calibration, calibrate
from .guidance import NAG, NASA, VSF
from .method import Method
from .methods import FORA, BlockCaching, DeepCache, DeltaDiT, FewerSteps, GuidanceStop, SkipCache, TGate
from .plan import Plan
from .planning import plan

__all__ = [
    "FORA",
    "NAG",
    "NASA",
    "VSF",
    "Attachment",
    "BlockCaching",
    "Calibration",
    "DeepCache",
    "DeltaDiT",
    "FewerSteps",
    "GuidanceStop",
    "Method",
    "Plan",
    "SkipCache",
    "TGate",
    "attach",
    "calibrate",
    "plan",
]
