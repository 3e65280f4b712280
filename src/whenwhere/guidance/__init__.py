"""Guidance inside attention: the operators are pure functions, the stock processors are run for both texts."""

from .edits import Report
from .nag import NAG, NASA, VSF
from .reporting import report
from .text import Text

__all__ = ["NAG", "NASA", "VSF", "Report", "Text", "report"]
