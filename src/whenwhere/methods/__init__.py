"""Published methods, one paper per file."""

from .deepcache import DeepCache
from .fewersteps import FewerSteps
from .fora import FORA
from .guidancestop import GuidanceStop
from .skipcache import SkipCache
from .tgate import TGate

__all__ = ["FORA", "DeepCache", "FewerSteps", "GuidanceStop", "SkipCache", "TGate"]
