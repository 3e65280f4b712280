"""Frozen cross-attention alone: one of T-GATE's two decisions (Liu et al., 2024, https://arxiv.org/abs/2404.02747).

T-GATE freezes cross-attention and drops guidance at one step. Here the first is done without the second, so that each
can have its own step, and what each is worth can be told: with `GuidanceStop` at the same step it is T-GATE.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..clock import Step
from ..decision import Compute, Decision, Keep
from ..decisions.branches import ReuseAcross, branch_mean, each_branch, keep_of_both, reuse_of_both
from ..position import FromStep, Position
from ..ranges import one_of
from ..site import Kind, Site

_KEEPS: dict[str, Keep] = {"each": each_branch, "mean": branch_mean}


@dataclass(frozen=True)
class CrossAttentionFreeze(FromStep):
    """Freeze cross-attention after m evaluations, with or without guidance.

    Attributes:
        step: m, evaluations with computed cross-attention, in 1 ... steps; a float in (0, 1) is a fraction of the
            executed schedule, rounded; at `Timestep(t)` or `Sigma(s)` the first step below it is the first frozen one.
            The number of steps leaves cross-attention as it is.
        anchor: what is frozen: the output of "each" guidance branch for itself, or their "mean" for all, as in T-GATE
            (equation 6).

    Raises:
        ValueError: a field out of range, here or, for `step`, when the number of steps is known.
        TypeError: `step` is no position.
    """

    step: Position = 10
    anchor: Literal["each", "mean"] = "each"

    kinds: ClassVar = frozenset({Kind.CROSS_ATTENTION})
    does: ClassVar = "freezes"
    lasting: ClassVar = True
    idle_reason: ClassVar = "cross-attention is frozen only after the last step."

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("anchor", self.anchor, _KEEPS)

    def check(self, sites: Sequence[Site], model: str) -> None:
        """It needs cross-attention."""
        if not any(site.kind is Kind.CROSS_ATTENTION for site in sites):
            raise ValueError(f"{self} needs cross-attention; {model} has none. GuidanceStop works on this model.")

    def decide(self, site: Site, step: Step) -> Decision | None:  # noqa: ARG002
        """Keep at step m - 1, reuse from m on."""
        if self.anchor == "mean" and step.branches > 2:
            raise ValueError(
                f'{self} averages two guidance branches; this pipeline\'s batch has {step.branches}. anchor="each" '
                "works on it."
            )
        m, keep = self.first(step), _KEEPS[self.anchor]
        mean = keep is branch_mean  # in one slot, whether of a batch or of separate calls
        if step.index >= m:
            return reuse_of_both(keep) if mean and step.branches == 1 else ReuseAcross(keep, shared=mean)
        if step.index < m - 1:
            return None
        return keep_of_both(keep, step) if mean else Compute(keep)

    def renews(self, step: Step) -> bool:
        """At the step whose outputs are kept, so that every cross-attention is reached."""
        return step.index == self.first(step) - 1 < step.count - 1
