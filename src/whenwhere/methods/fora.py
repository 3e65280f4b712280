"""FORA: fast-forward caching in diffusion transformer acceleration (Selvaraju et al., 2024,
https://arxiv.org/abs/2407.01425).

The outputs of attention and MLP change little from step to step. Every N steps all of them are computed and kept; in
between they are reused as they were. Gates, norms of the final layer and embeddings see the present timestep, and the
residual stream starts from the present latents, at every step.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..clock import Step
from ..decision import Compute, Decision, Reuse, outline, whole
from ..method import Method, Setting
from ..ranges import at_least, one_of
from ..site import TOGETHER, Kind, Site

_BRANCHES = (Kind.SELF_ATTENTION, Kind.CROSS_ATTENTION, Kind.JOINT_ATTENTION, Kind.MLP)


@dataclass(frozen=True)
class FORA(Method):
    """FORA.

    What is kept is the output of a residual branch before its gate; where attention and MLP share one branch (Flux's
    single blocks), that of both. Steps s count evaluations from 0.

    Attributes:
        interval: N, at least 1: everything is computed every N steps; 1 is the plain run.
        anchor: where the grid of full steps is fixed. "end" is the authors' code, which counts down: the first step and
            every s with (steps - 1 - s) divisible by N. "start" is every s divisible by N, as later work has it.
        branches: the kinds of site that are reused, among "self-attention", "cross-attention", "joint-attention" and
            "mlp"; a model has some of them.
        blocks: numbers of the blocks in which they are reused; empty for all.
        start_step, end_step: outside of start_step <= s < end_step everything is computed; `None` for no end.

    Raises:
        ValueError: a field out of range, here or when the model and the number of steps are known.
        TypeError: a field of the wrong type.
    """

    interval: int = 3
    anchor: Literal["end", "start"] = "end"
    branches: tuple[str, ...] = tuple(kind.value for kind in _BRANCHES)
    blocks: tuple[int, ...] = ()
    start_step: int = 0
    end_step: int | None = None

    kinds: ClassVar = frozenset({*_BRANCHES, *TOGETHER})
    idle_reason: ClassVar = "every step is a full one; choose a larger interval, or a wider window."

    def __post_init__(self) -> None:
        at_least(1, interval=self.interval)
        one_of("anchor", self.anchor, ("end", "start"))
        object.__setattr__(self, "branches", tuple(self.branches))
        object.__setattr__(self, "blocks", tuple(self.blocks))
        for branch in self.branches:
            one_of("branches", branch, tuple(kind.value for kind in _BRANCHES))
        if not self.branches:
            raise ValueError("branches must name at least one kind of site; without any, nothing is reused")
        at_least(0, start_step=self.start_step, **{f"blocks[{i}]": block for i, block in enumerate(self.blocks)})
        if self.end_step is not None:
            at_least(self.start_step, end_step=self.end_step)

    def asks(self, site: Site) -> bool:
        """The branches of the chosen blocks."""
        chosen = site.kind in self.branches or (site.kind in TOGETHER and self._joins)
        return chosen and (not self.blocks or site.block in self.blocks)

    def conflict(self, other: Method, sites: Sequence[Site]) -> str:
        """Where attention and MLP are reused together, the shape alone of either is handed on."""
        if other.observes and self._joins and any(site.parallel for site in sites):
            return "it would remember the attention of single blocks at steps at which that puts out a shape alone."
        return super().conflict(other, sites)

    @property
    def _joins(self) -> bool:
        """Whether a branch of attention and MLP together is reused."""
        return {Kind.JOINT_ATTENTION, Kind.MLP} <= set(self.branches)

    def check(self, sites: Sequence[Site], model: str) -> None:
        """The chosen blocks must exist."""
        count = max((site.blocks for site in sites), default=0)
        if self.blocks and max(self.blocks) >= count:
            raise ValueError(f"{self}: {model} has the blocks 0 to {count - 1}.")

    def review(self, setting: Setting) -> None:
        """The window must lie in the schedule; with less than two intervals little is saved."""
        if self.start_step > setting.steps:
            raise ValueError(f"{self} begins its window at step {self.start_step}; only {setting.steps} are executed.")
        if self.end_step is not None and self.end_step > setting.steps:
            raise ValueError(f"{self} ends its window at step {self.end_step}; only {setting.steps} are executed.")
        if self.interval > 1 and setting.steps < 2 * self.interval:
            warnings.warn(
                f"{self}: {setting.steps} steps are less than two intervals; reuse over so few steps is coarse.",
                stacklevel=2,
            )

    def full(self, step: Step) -> bool:
        """Whether everything is computed at a step."""
        if step.index < self.start_step or (self.end_step is not None and step.index >= self.end_step):
            return True
        if self.anchor == "start":
            return step.index % self.interval == 0
        return step.index == 0 or (step.count - 1 - step.index) % self.interval == 0

    def decide(self, site: Site, step: Step) -> Decision | None:
        """Full steps compute and keep, the others reuse; of what only a projection reads, the shape will do."""
        keep = outline if site.parallel and self._joins and site.kind is not Kind.PROJECTION else whole
        return Compute(keep) if self.full(step) else Reuse(keep)
