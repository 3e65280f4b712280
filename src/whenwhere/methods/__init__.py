"""Published methods, one paper per file."""

from .adaptivetgate import AdaptiveTGate
from .blockcaching import BlockCaching
from .cfg import CFG
from .crossattentionfreeze import CrossAttentionFreeze
from .deepcache import DeepCache
from .deltadit import DeltaDiT
from .fasterdiffusion import FasterDiffusion
from .fewersteps import FewerSteps
from .fora import FORA
from .guidancestop import GuidanceStop
from .skipcache import SkipCache
from .skipdrift import SkipDrift
from .skipforecast import SkipForecast
from .skipoffset import SkipOffset
from .textstreamfreeze import TextStreamFreeze
from .tgate import TGate
from .toca import ToCa
from .upstream import Upstream

__all__ = [
    "CFG",
    "FORA",
    "AdaptiveTGate",
    "BlockCaching",
    "CrossAttentionFreeze",
    "DeepCache",
    "DeltaDiT",
    "FasterDiffusion",
    "FewerSteps",
    "GuidanceStop",
    "SkipCache",
    "SkipDrift",
    "SkipForecast",
    "SkipOffset",
    "TGate",
    "TextStreamFreeze",
    "ToCa",
    "Upstream",
]
