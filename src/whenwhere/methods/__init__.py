"""Published methods, one paper per file."""

from .deepcache import DeepCache
from .fewersteps import FewerSteps
from .fora import FORA
from .guidancestop import GuidanceStop
from .tgate import TGate

__all__ = ["FORA", "DeepCache", "FewerSteps", "GuidanceStop", "TGate"]
