"""Networks of our own that have weights."""

from .checkpoints import load_published
from .skip_dit import SkipDiTTransformer2DModel
from .skip_latte import SkipLatteTransformer3DModel

__all__ = ["SkipDiTTransformer2DModel", "SkipLatteTransformer3DModel", "load_published"]
