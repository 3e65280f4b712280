"""Decisions that adjust what is reused by a trained scale and shift (Block Caching, section 3.4)."""

from dataclasses import dataclass
from typing import ClassVar

from ..decision import Call, Output, Reuse, Slot
from .change import AddChange, entering, plus
from .scaleshift import ScaleShift


@dataclass(frozen=True, slots=True)
class ReuseAdjusted(Reuse):
    """Return what was kept, scaled and shifted, instead of running the module."""

    scale_shift: ScaleShift | None = None

    symbol: ClassVar[str] = "~"
    name: ClassVar[str] = "reused, scaled and shifted"

    def apply(self, call: Call, slot: Slot) -> Output:
        """Recall and adjust."""
        return _adjusted(self.scale_shift, call, slot)


@dataclass(frozen=True, slots=True)
class AddAdjusted(AddChange):
    """Instead of running a block, add the change that is remembered, scaled and shifted."""

    scale_shift: ScaleShift | None = None

    symbol: ClassVar[str] = "~"
    name: ClassVar[str] = "change added, scaled and shifted"

    def apply(self, call: Call, slot: Slot) -> Output:
        """The present input plus what is remembered, adjusted."""
        change = _adjusted(self.scale_shift, call, slot)
        return plus(entering(call, change), change)


def _adjusted(scale_shift: ScaleShift | None, call: Call, slot: Slot) -> Output:
    kept = slot.get(call)
    return kept if scale_shift is None else scale_shift.adjust(kept, call.site.path, call.step.index)
