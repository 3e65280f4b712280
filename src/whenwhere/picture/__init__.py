"""Plans and results as pictures, drawn with Pillow. Imported by whoever draws, never by the core."""

from .chart import draw_plan
from .sheet import Column, as_image, beside, draw_sheet, enlarge, stack

__all__ = ["Column", "as_image", "beside", "draw_plan", "draw_sheet", "enlarge", "stack"]
