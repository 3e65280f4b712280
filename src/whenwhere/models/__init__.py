"""Networks of our own that have weights."""

from .skip_dit import SkipDiTTransformer2DModel
from .skip_latte import SkipLatteTransformer3DModel

__all__ = ["SkipDiTTransformer2DModel", "SkipLatteTransformer3DModel"]
