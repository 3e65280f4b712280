"""Skip-Cache by drift: ours, on the blocks of Skip-Cache (Chen et al., 2024, https://arxiv.org/abs/2411.17616).

Skip-Cache refreshes on a fixed grid. The first block runs at every step anyway, so how far its output has moved since
the last full step is known for free; when it has moved too far, the step becomes a full one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..clock import Step
from ..decision import Call, Compute, Decision, Output, Reuse, Slot, outline, whole
from ..decisions.measuring import change
from ..longskips import LongSkips
from ..method import Method
from ..ranges import at_least
from ..site import Site


@dataclass(frozen=True)
class SkipDrift(LongSkips):
    """Skip-Cache that refreshes when the first block's output has drifted.

    A plan made beforehand is drawn as if nothing drifted, which is the least it can cost; the trace tells what was
    computed. One number is read off the device at every step that may be partial.

    Attributes:
        threshold: at least 0: a step is full if ||now - then||_1 / ||now||_1 of the first block's output, the mean of
            all rows of the batch, is above it; then is the last full step. 0 is the plain run wherever anything moves.
        longest: at least 1: a full step every so many in any case.
        depth, start_timestep, stop_timestep: as in `SkipCache`.

    Raises:
        ValueError: a field out of range, here or when the model is known; a solver that evaluates a timestep twice.
        TypeError: a field of the wrong type.
    """

    threshold: float = 0.1
    longest: int = 10
    depth: int = 1
    start_timestep: float = 1000
    stop_timestep: float = 0

    idle_reason: ClassVar = "every step drifted too far, or none is in the window; choose a larger threshold."

    def __post_init__(self) -> None:
        at_least(1, longest=self.longest, depth=self.depth)
        self.check_window()
        if not isinstance(self.threshold, int | float) or isinstance(self.threshold, bool):
            raise TypeError(f"threshold must be a number, got {self.threshold!r}")
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {self.threshold}")

    def conflict(self, other: Method, sites: Sequence[Site]) -> str:
        """Which steps are full is known only while it runs, too late for others that skip blocks."""
        if not other.innermost and any(self.asks(site) and other.asks(site) for site in sites):
            return "both skip blocks, and at which steps SkipDrift does is known only while it runs."
        return super().conflict(other, sites)

    def remark(self, step: Step, notes: Mapping[str, Any]) -> str:  # noqa: ARG002
        """That a plan is the least, or how many steps drifted."""
        if not notes:
            return "SkipDrift: drawn as if nothing drifted; steps that drift are full"
        return f"SkipDrift: {notes['drifted']} of {notes['watched']} steps drifted by more than {self.threshold:g}"

    def decide(self, site: Site, step: Step) -> Decision | None:
        """Full steps keep what enters the last k blocks, and the first block's output; the others watch that."""
        full = self.full_every(self.longest, step)
        if site.index == 0:
            return Compute(whole) if full else WatchDrift(self.threshold)
        if site.depth is None or site.depth < self.depth:
            return None
        keep = whole if site.carries and site.depth == self.depth else outline
        return Compute(keep) if full else Reuse(keep)


@dataclass(frozen=True, slots=True)
class WatchDrift(Decision):
    """Run, compare with what is remembered; beyond the threshold the method forgets, so that the step is full."""

    threshold: float

    symbol: ClassVar[str] = "?"
    name: ClassVar[str] = "computed and compared"
    recalls: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """Run and compare; what is recalled later in this step is then computed and kept again."""
        output = call.run()
        changes, _ = change(slot.get(call), output, "l1rel")
        drifted = bool(changes.mean() > self.threshold)
        call.notes["watched"] = call.notes.get("watched", 0) + 1
        call.notes["drifted"] = call.notes.get("drifted", 0) + drifted
        if drifted:
            method, _, pass_ = slot.key
            for other in slot.memory.slots.values():
                if other is not slot and (other.key[0], other.key[2]) == (method, pass_):
                    other.value = other.shape = None
                    slot.memory.account(other, 0)
            slot.put(output, call)
        return output

    def fresh(self) -> Decision:
        """Run and keep."""
        return Compute(whole)
