"""DeepCache: accelerating diffusion models for free (Ma et al., CVPR 2024, https://arxiv.org/abs/2312.00858).

The deep features of a U-Net change slowly between neighbouring steps. At full steps everything is computed; in between
only a shallow rim of the network runs, and the deep feature that would have entered it is the one of the last full
step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from ..clock import Step
from ..decision import Compute, Decision, Keep, Output, Reuse, outline, whole
from ..method import Method
from ..ranges import at_least
from ..site import Kind, Site


@dataclass(frozen=True)
class DeepCache(Method):
    """DeepCache.

    Residual k joins the encoder layer that pushes it and the decoder layer that pops it; both have depth k, the middle
    is deepest. Off the full steps whatever is deeper than `branch` is skipped, and only the one tensor that enters the
    rim is remembered. A ControlNet runs at the full steps only.

    Attributes:
        interval: N, at least 1: a full step every N evaluations, counted from the first executed one; 1 is the
            plain run, whatever the power.
        branch: b in 0 ... R - 1, R the number of residuals: the deepest one that is computed at every step. The paper's
            "skip branch" is b + 1, the public helper's `cache_branch_id` is b.
        center: at least 0: the step around which the non-uniform schedule of equation 7 is dense; it has as many full
            steps as the uniform one.
        pow: the power of that schedule, at least 1; 1 is the uniform schedule.
        full_steps: an explicit list of full steps instead, ascending from 0.

    Raises:
        ValueError: a field out of range, here or when the model and the number of steps are known.
        TypeError: a field of the wrong type.
    """

    interval: int = 3
    branch: int = 0
    center: int = 0
    pow: float = 1.0
    full_steps: tuple[int, ...] = ()

    kinds: ClassVar = frozenset({Kind.STAGE, Kind.LAYER, Kind.BLOCK, Kind.CONTROL})
    idle_reason: ClassVar = "every executed step is a full one; choose a larger interval."

    def __post_init__(self) -> None:
        at_least(1, interval=self.interval)
        at_least(0, branch=self.branch, center=self.center)
        if not self.pow >= 1:
            raise ValueError(f"pow must be at least 1 (1 is the uniform schedule), got {self.pow}")
        object.__setattr__(self, "full_steps", tuple(self.full_steps))
        at_least(0, **{f"full_steps[{i}]": step for i, step in enumerate(self.full_steps)})
        if self.full_steps and (self.full_steps[0] != 0 or list(self.full_steps) != sorted(set(self.full_steps))):
            raise ValueError(f"full_steps must ascend from 0 without repetition, got {self.full_steps}")

    def asks(self, site: Site) -> bool:
        """Sites on the skip ladder, and a ControlNet."""
        return site.kind in self.kinds and (site.depth is not None or site.kind is Kind.CONTROL)

    def check(self, sites: Sequence[Site], model: str) -> None:
        """DeepCache needs skip connections, and a branch that exists."""
        residuals = max((site.depth for site in sites if site.depth is not None), default=0)
        if not residuals:
            raise ValueError(
                f"{self} needs an encoder and a decoder joined by skip connections; {model} has none. TGate works on "
                "models with cross-attention, GuidanceStop on all that run with guidance."
            )
        if self.branch >= residuals:
            raise ValueError(f"{self}: {model} has the branches 0 to {residuals - 1}.")

    def decide(self, site: Site, step: Step) -> Decision | None:
        """Full steps compute and keep, the others recall what is deeper than the branch."""
        if site.kind is Kind.CONTROL:
            keep = Keep("rim residuals", self._rim, self._rim_size, hollow=True)
        elif site.depth is None or site.depth <= self.branch:
            return None
        else:
            keep = whole if site.carries and site.depth == self.branch + 1 else outline
        return Compute(keep) if step.index in self.schedule(step.count) else Reuse(keep)

    def schedule(self, steps: int) -> frozenset[int]:
        """The full steps among this many.

        Raises:
            ValueError: the explicit list reaches beyond the last step, or no non-uniform schedule exists.
        """
        if self.full_steps:
            if self.full_steps[-1] >= steps:
                raise ValueError(f"{self}: only the steps 0 to {steps - 1} are executed.")
            return frozenset(self.full_steps)
        if self.pow == 1 or self.interval == 1:
            return frozenset(range(0, steps, self.interval))
        return frozenset(nonuniform(steps, math.ceil(steps / self.interval), self.center, self.pow))

    def _rim(self, output: Output, _: object) -> Output:
        """Of a ControlNet's output the residuals that are still added off the full steps; outlines of the rest."""
        down, middle = output[0], output[1]
        kept = [residual if k <= self.branch else outline.of(residual, None) for k, residual in enumerate(down)]
        return tuple(kept), outline.of(middle, None)

    def _rim_size(self, parts: Sequence[int], branches: int) -> int:
        return branches * sum(parts[: self.branch + 1])


@cache
def nonuniform(steps: int, full: int, center: int, power: float) -> tuple[int, ...]:
    """The non-uniform schedule of equation 7, as the published results used it.

    `full` + 1 points evenly spaced between (-center)^(1/power) and (steps - center)^(1/power), raised to `power`, cut
    to whole numbers (towards the centre), moved back by `center`. The root of the negative number is the principal
    complex one and only real parts are kept, which is not the signed power that the text suggests. Where points
    coincide the power is lowered by 0.02.

    Raises:
        ValueError: center outside the schedule, or no power above 1 gives so many steps.
    """
    if not 0 <= center < steps:
        raise ValueError(f"center must lie within the {steps} executed steps, got {center}")
    p = power
    while p > 1:
        first, last = complex(-center) ** (1 / p), complex(steps - center) ** (1 / p)
        points = [((first + (last - first) * i / full) ** p).real for i in range(full + 1)]
        found = sorted({int(point) + center for point in points})[:-1]
        if len(found) >= full:
            return (0, *found[1:])
        p -= 0.02
    raise ValueError(f"no power above 1 spreads {full} full steps over {steps} around {center}; asked for {power}")
