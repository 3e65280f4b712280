"""Skip-Cache with a forecast: ours, on the schedule of Skip-Cache (Chen et al., 2024, https://arxiv.org/abs/2411.17616).

Skip-Cache takes the feature of the last full step as it is. Here it moves on: the features of the last two full steps
lie on a line over the timestep, and partial steps read the line where they are. Two tensors are remembered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import nn

from ..clock import Step
from ..decision import Call, Compute, Decision, Output, Reuse, Slot, outline
from ..longskips import check_ladder, check_skips, check_window, is_full
from ..method import Method
from ..ranges import at_least
from ..site import Kind, Site


@dataclass(frozen=True)
class SkipForecast(Method):
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

    kinds: ClassVar = frozenset({Kind.BLOCK})
    reads_timestep: ClassVar = True
    idle_reason: ClassVar = "no step is partial: so few steps leave none in the window, or the interval is 1."

    def __post_init__(self) -> None:
        at_least(1, interval=self.interval, depth=self.depth)
        check_window(self.start_timestep, self.stop_timestep)
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength must be at least 0, got {self.strength}")

    def asks(self, site: Site) -> bool:
        """Blocks joined by long skips."""
        return site.kind in self.kinds and site.depth is not None

    def check(self, sites: Sequence[Site], model: str) -> None:
        """It needs long skips, two blocks for each, and as many as are recomputed."""
        check_ladder(self, self.depth, sites, model)

    def fit(self, denoiser: nn.Module, pipe: object = None) -> Self:  # noqa: ARG002
        """Every recomputed pair needs its skip; otherwise the method is as it was."""
        check_skips(self, self.depth, denoiser)
        return self

    def decide(self, site: Site, step: Step) -> Decision | None:
        """Full steps keep what enters the last k blocks, beside what was kept before; the others continue it."""
        if site.depth is None or site.depth < self.depth:
            return None
        full = is_full(step, self.interval, self.start_timestep, self.stop_timestep, self)
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

    def share(self) -> float:
        """Nothing is spent."""
        return 0.0
