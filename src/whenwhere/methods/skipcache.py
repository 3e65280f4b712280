"""Skip-Cache, of "Accelerating vision diffusion transformers with skip branches" (Chen et al., ICCV 2025,
https://arxiv.org/abs/2411.17616).

In a transformer whose blocks are joined by long skips (block i to block L - 1 - i) the deep features change slowly.
Within a window of timesteps only the first and the last k blocks run at most steps; what enters the last ones is the
feature of the last full step, and the fresh skips of the first ones correct it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from ..clock import Step
from ..decision import Compute, Decision, Reuse, outline, whole
from ..longskips import LongSkips
from ..ranges import at_least
from ..site import Site


@dataclass(frozen=True)
class SkipCache(LongSkips):
    """Skip-Cache.

    Steps are counted from the first executed one, so the window does not move the grid of full steps. One tensor is
    remembered. Thresholds are timesteps as the scheduler has them, t of 1000; flow-matching schedulers give
    1000 * sigma.

    Attributes:
        interval: N, at least 1: a full step every N steps; 1 is the plain run.
        depth: k in 1 ... L/2 - 1: blocks that are computed at every step at each end; in Latte with skips a block over
            space and the one over time after it count as one.
        start_timestep: only steps with t below it may be partial, at most 1000.
        stop_timestep: from the step after the first one with t at most this, everything is computed; at least 0 and
            below `start_timestep`.
        schedule: in place of the interval and the window, which are then left as they are: the numbers of the full
            steps, 0 among them, or a truth value for every step. Evaluations are counted, so any solver will do.

    Raises:
        ValueError: a field out of range, here or when the model or the number of steps is known; a solver that
            evaluates a timestep twice.
        TypeError: a field of the wrong type.
    """

    interval: int = 2
    depth: int = 1
    start_timestep: float = 700
    stop_timestep: float = 50
    schedule: Sequence[int] = ()

    def __post_init__(self) -> None:
        at_least(1, interval=self.interval, depth=self.depth)
        self.check_window()
        object.__setattr__(self, "schedule", tuple(self.schedule))
        if self.schedule:
            self._check_schedule()

    def _check_schedule(self) -> None:
        mask = {isinstance(entry, bool) for entry in self.schedule} == {True}
        if not mask:
            at_least(0, **{f"schedule[{i}]": step for i, step in enumerate(self.schedule)})
        if not (self.schedule[0] if mask else 0 in self.schedule):
            raise ValueError(f"the first step of the schedule {self.schedule} must be full: nothing is kept before it")
        grid = (self.interval, self.start_timestep, self.stop_timestep)
        if grid != (SkipCache.interval, SkipCache.start_timestep, SkipCache.stop_timestep):
            raise ValueError("give either a schedule, or interval, start_timestep and stop_timestep, not both")

    @property
    def reads_timestep(self) -> bool:  # type: ignore[override]
        """Unless the steps are listed."""
        return not self.schedule

    @classmethod
    def parse(cls, schedule: str, depth: int = 1) -> Self:
        """The method from the authors' notation `N<interval>-<start_timestep>-<stop_timestep>`, such as "N2-700-50".

        Raises:
            ValueError: the text is not of this form, or a number in it is out of range.
        """
        parts = schedule.split("-")
        if len(parts) != 3:
            raise ValueError(f"a schedule has three parts, as in 'N2-700-50'; {schedule!r} has {len(parts)}")
        for part, form in zip(parts, (r"N[1-9]\d*", r"\d+", r"\d+"), strict=True):
            if not re.fullmatch(form, part, re.ASCII):
                raise ValueError(f"{part!r} in the schedule {schedule!r} is not understood; an example is 'N2-700-50'")
        return cls(int(parts[0][1:]), depth, int(parts[1]), int(parts[2]))

    def full(self, step: Step) -> bool:
        """Whether everything is computed at a step.

        Raises:
            ValueError: the schedule is for another number of steps.
        """
        listed = self.schedule
        if not listed:
            return self.full_every(self.interval, step)
        mask = isinstance(listed[0], bool)
        if len(listed) != step.count if mask else max(listed) >= step.count:
            told = f"has {len(listed)} entries" if mask else f"lists step {max(listed)}"
            raise ValueError(f"the schedule of SkipCache {told}, but {step.count} steps are executed (0 is the first).")
        return bool(listed[step.index]) if mask else step.index in listed

    def decide(self, site: Site, step: Step) -> Decision | None:
        """Full steps keep what enters the last k blocks, the others recall it."""
        if site.depth is None or site.depth < self.depth:
            return None
        keep = whole if site.carries and site.depth == self.depth else outline
        return Compute(keep) if self.full(step) else Reuse(keep)
