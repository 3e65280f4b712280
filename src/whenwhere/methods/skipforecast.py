"""Skip-Cache with a forecast: ours, on the schedule of Skip-Cache (Chen et al., 2024, https://arxiv.org/abs/2411.17616).

Skip-Cache takes the feature of the last full step as it is. Here it moves on: the features of the last two full steps
lie on a line over the timestep, and partial steps read the line where they are. Two tensors are remembered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..clock import Step
from ..decision import Call, Compute, Decision, Output, Reuse, Slot, outline
from ..longskips import LongSkips
from ..ranges import at_least
from ..site import Site


@dataclass(frozen=True)
class SkipForecast(LongSkips):
    """Skip-Cache whose cached tensor is continued to first order.

    Attributes:
        interval, depth, start_timestep, stop_timestep: as in `SkipCache`.
        strength: at least 0: how far the line is followed; 1 is the line, 0 is Skip-Cache.

    Raises:
        ValueError: a field out of range, here or when the model is known; a solver that evaluates a timestep twice.
        TypeError: a field of the wrong type.
    """

    interval: int = 2
    depth: int = 1
    start_timestep: float = 700
    stop_timestep: float = 50
    strength: float = 1.0

    def __post_init__(self) -> None:
        at_least(1, interval=self.interval, depth=self.depth)
        self.check_window()
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength must be at least 0, got {self.strength}")

    def decide(self, site: Site, step: Step) -> Decision | None:
        """Full steps keep what enters the last k blocks, beside what was kept before; the others continue it."""
        if site.depth is None or site.depth < self.depth:
            return None
        full = self.full_every(self.interval, step)
        if not (site.carries and site.depth == self.depth):
            return Compute(outline) if full else Reuse(outline)
        return KeepTwo(older=step.index > 0) if full else Continue(self.strength)


@dataclass(frozen=True, slots=True)
class KeepTwo(Decision):
    """Run, and remember the output with its timestep, and that of the time before.

    Attributes:
        older: whether there is a time before; plans count its bytes.
    """

    older: bool

    symbol: ClassVar[str] = "#"
    name: ClassVar[str] = "computed"

    def apply(self, call: Call, slot: Slot) -> Output:
        """Run and remember."""
        output = call.run()
        before = None if slot.empty else (slot.get(call)[0], slot.value[1])
        slot.put((output, call.step.timestep, before), call)
        return output

    @property
    def keeps(self) -> bool:
        """Always."""
        return True

    def bare(self) -> Decision:
        """Run, nothing else."""
        return Compute()

    def kept_bytes(self, parts: Sequence[int], branches: int) -> int:
        """One tensor, or two."""
        return branches * sum(parts) * (2 if self.older else 1)


@dataclass(frozen=True, slots=True)
class Continue(Decision):
    """The value at the present timestep of the line through the two remembered ones; the last one where it is alone."""

    strength: float

    symbol: ClassVar[str] = "~"
    name: ClassVar[str] = "forecast"
    recalls: ClassVar[bool] = True
    stops: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """Read the line."""
        last, t, before = slot.get(call)
        if before is None or not self.strength:
            return last
        earlier, when = before
        share = self.strength * (call.step.timestep - t) / (t - when)
        return last + share * (last - earlier)

    def fresh(self) -> Decision:
        """Run and keep."""
        return KeepTwo(older=False)
