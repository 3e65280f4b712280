"""Decisions: what to do at one site and step.

A decision is a small frozen object. It gets the call it stands in front of and the slot of its method at this site, and
returns what the module would have returned.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .call import Call, Output, map_tensors
from .layout import Branches
from .memory import Keep, Memory, Slot, outline, room, whole
from .pricing.unit import Macs, Unit

__all__ = [
    "Call",
    "Compute",
    "Decision",
    "Keep",
    "Memory",
    "Output",
    "Reuse",
    "Slot",
    "map_tensors",
    "outline",
    "room",
    "whole",
]


class Decision(ABC):
    """What to do at one site and step."""

    symbol: ClassVar[str]  # one character, for the printed plan
    name: ClassVar[str]  # a word, for legends
    recalls: ClassVar[bool] = False  # whether it needs something remembered
    stops: ClassVar[bool] = False  # whether the module itself does not run, nor anything inside it
    neutral: ClassVar[bool] = False  # whether nothing but computing is done
    shared: bool = False  # whether its slot is the same in every pass
    home: str = ""  # names the slot that several sites share; without a name every site has its own

    @abstractmethod
    def apply(self, call: Call, slot: Slot) -> Output:
        """Return what stands for the module's output."""

    def fresh(self) -> "Decision":
        """What to do instead when nothing is remembered, or when another method asks for a full evaluation."""
        return self

    @property
    def hollow(self) -> bool:
        """Whether what it returns is not the module's own output, but makes sense in a skipped region as a whole."""
        return False

    def share(self) -> float:
        """The share of the site's multiply-adds that is spent, in [0, 1]."""
        return 0.0 if self.stops else 1.0

    def inner_branches(self, branches: int) -> int:
        """Guidance branches that reach the sites inside, given those that enter."""
        return branches

    def inner_layout(self, branches: Branches) -> Branches:
        """The layout that reaches the sites inside, given the one that enters."""
        return branches

    @property
    def keeps(self) -> bool:
        """Whether something is remembered afterwards that was not before."""
        return False

    @property
    def reads(self) -> bool:
        """Whether what it remembers comes of what the module puts out in this step."""
        return self.keeps

    def bare(self) -> "Decision":
        """The same without keeping anything: what remains of it where no later step recalls."""
        return self

    def kept_bytes(self, parts: Sequence[int], branches: int) -> int:  # noqa: ARG002
        """Bytes per image that are newly remembered, given those of one row of every tensor of the output."""
        return 0

    def held_bytes(self, unit: Unit, branches: int, samples: int) -> int:
        """Bytes that are newly remembered, all samples together."""
        return self.kept_bytes(unit.bytes, branches) * samples

    def saved(self, unit: Unit) -> Macs:  # noqa: ARG002
        """Multiply-adds of one row that are not spent although the module runs."""
        return Macs()

    def extra(self, unit: Unit, samples: int) -> Macs:  # noqa: ARG002
        """Multiply-adds spent beyond the site's own, all samples together."""
        return Macs()


@dataclass(frozen=True, slots=True)
class Compute(Decision):
    """Run the module; keep its output, or a part of it, if asked to."""

    keep: Keep | None = None
    shared: bool = False

    symbol: ClassVar[str] = "#"
    name: ClassVar[str] = "computed"
    neutral: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """Run, and remember for later."""
        output = call.run()
        if self.keep is None:
            return output
        slot.put(self.keep.of(output, call.branches), call, self.keep.folds_by(call.branches))
        if self.keep.folds and call.branches is None:
            slot.memory.unsettled.append((slot, self.keep, call))
        return output

    @property
    def keeps(self) -> bool:
        """Whether a keep is asked for."""
        return self.keep is not None

    def bare(self) -> Decision:
        """Run the module, nothing else."""
        return Compute()

    def kept_bytes(self, parts: Sequence[int], branches: int) -> int:
        """As many as the keep says."""
        return 0 if self.keep is None else self.keep.size(parts, branches)


@dataclass(frozen=True, slots=True)
class Reuse(Decision):
    """Return what was kept instead of running the module."""

    keep: Keep = whole  # what to keep if the module has to run after all
    shared: bool = False

    symbol: ClassVar[str] = "."
    name: ClassVar[str] = "reused"
    recalls: ClassVar[bool] = True
    stops: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """Recall."""
        kept = slot.get(call)
        return map_tensors(kept, room) if self.keep is outline else kept

    @property
    def hollow(self) -> bool:
        """As the keep is."""
        return self.keep.hollow

    def fresh(self) -> Decision:
        """Run and keep."""
        return Compute(self.keep, self.shared)
