"""Decide when and where a Transformer computes."""

import importlib
from types import ModuleType

from .anatomy import Anatomy, Part
from .attach import Attachment, attach, detach
from .bench.choice import Choice, load_choice
from .calibration import Calibration, calibrate
from .clock import Step
from .compiling import compile_inside
from .decision import Compute, Decision, Reuse, whole
from .guidance import NAG, NASA, VSF
from .method import Method
from .methods import (
    FORA,
    AdaptiveTGate,
    BlockCaching,
    CrossAttentionFreeze,
    DeepCache,
    DeltaDiT,
    FasterDiffusion,
    FewerSteps,
    GuidanceStop,
    SkipCache,
    SkipDrift,
    SkipForecast,
    SkipOffset,
    TextStreamFreeze,
    TGate,
    ToCa,
    Upstream,
)
from .plan import Plan
from .planning import plan
from .position import Sigma, Timestep
from .site import Kind, Site

__all__ = [
    "FORA",
    "NAG",
    "NASA",
    "VSF",
    "AdaptiveTGate",
    "Anatomy",
    "Attachment",
    "BlockCaching",
    "Calibration",
    "Choice",
    "Compute",
    "CrossAttentionFreeze",
    "Decision",
    "DeepCache",
    "DeltaDiT",
    "FasterDiffusion",
    "FewerSteps",
    "GuidanceStop",
    "Kind",
    "Method",
    "Part",
    "Plan",
    "Reuse",
    "Sigma",
    "Site",
    "SkipCache",
    "SkipDrift",
    "SkipForecast",
    "SkipOffset",
    "Step",
    "TGate",
    "TextStreamFreeze",
    "Timestep",
    "ToCa",
    "Upstream",
    "attach",
    "calibrate",
    "compile_inside",
    "detach",
    "load_choice",
    "plan",
    "whole",
]


def __getattr__(name: str) -> ModuleType:
    """`whenwhere.lm`, `.models` and `.zoo` are imported when first used: they bring heavy libraries with them."""
    if name in ("lm", "models", "zoo"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
