"""Published methods, one paper per file."""

from .deepcache import DeepCache
from .fewersteps import FewerSteps
from .guidancestop import GuidanceStop
from .tgate import TGate

__all__ = ["DeepCache", "FewerSteps", "GuidanceStop", "TGate"]
