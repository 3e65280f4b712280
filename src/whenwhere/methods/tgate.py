"""T-GATE: temporally gating attention (Liu et al., 2024, https://arxiv.org/abs/2404.02747, version 3).

The text decides the picture early and self-attention refines it late. So the outputs of cross-attention are frozen at a
gate step: their mean over the guidance branches stands for the text from then on, guidance is switched off, and only
one branch runs. Before the gate, self-attention may be reused at intervals. Most of the saving is the dropped branch;
the baseline that does only that is `GuidanceStop`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..clock import Step
from ..decision import Compute, Decision, Keep, Reuse, whole
from ..decisions.branches import (
    branch_mean,
    conditional_branch,
    drop_guidance,
    keep_of_both,
    reuse_of_both,
    unconditional_branch,
)
from ..method import Method
from ..position import Position, is_threshold, position, settle, told
from ..ranges import at_least, one_of
from ..ranges import position as fraction
from ..site import Kind, Site

_ANCHORS: dict[str, Keep] = {"mean": branch_mean, "cond": conditional_branch, "uncond": unconditional_branch}


@dataclass(frozen=True)
class TGate(Method):
    """T-GATE.

    Steps s count evaluations of the denoiser from 0. The gate step, s = m - 1, is computed in full with guidance and
    its attention outputs are kept; cross-attention is reused from s = m on. Self-attention before the gate is computed
    at s <= warm_up, at every multiple of `sp_interval` and at the gate step; from the gate on at every multiple of
    `fi_interval`. Without guidance nothing is averaged and no branch is dropped. Where guidance is a second call of the
    denoiser, the outputs of both calls are averaged, and from s = m on the conditional call answers for both.

    Attributes:
        gate_step: m, evaluations with guidance and computed cross-attention, in 1 ... steps; a float in (0, 1) is a
            fraction of the executed schedule, rounded; at `Timestep(t)` or `Sigma(s)` the first step below it is the
            first without them. m = steps leaves cross-attention as it is.
        sp_interval: k, at least 1; 1 computes self-attention at every step before the gate. A float in (0, 1) is a
            fraction of the executed schedule, rounded; appendix L advises 0.2. Published with DeepCache: 1.
        fi_interval: f, at least 1; 1 computes self-attention at every step after the gate, as in all published runs.
        warm_up: w, at least 0: steps before self-attention may be reused. Published with DeepCache: 0.
        anchor: what stands for cross-attention after the gate: "mean" of the branches (equation 6), or the "cond" or
            "uncond" branch alone (appendix K).

    Raises:
        ValueError: a field out of range, here or, for `gate_step`, when the number of steps is known.
        TypeError: a field of the wrong type.
    """

    gate_step: Position = 10
    sp_interval: int | float = 5
    fi_interval: int = 1
    warm_up: int = 2
    anchor: Literal["mean", "cond", "uncond"] = "mean"

    kinds: ClassVar = frozenset({Kind.MODEL, Kind.SELF_ATTENTION, Kind.CROSS_ATTENTION})
    idle_reason: ClassVar = "the gate is at the last step, or guidance was off and nothing is reused before the gate."

    def __post_init__(self) -> None:
        position("gate_step", self.gate_step, minimum=1)
        fraction("sp_interval", self.sp_interval, minimum=1)
        at_least(1, fi_interval=self.fi_interval)
        at_least(0, warm_up=self.warm_up)
        one_of("anchor", self.anchor, _ANCHORS)

    def check(self, sites: Sequence[Site], model: str) -> None:
        """T-GATE needs cross-attention."""
        if not any(site.kind is Kind.CROSS_ATTENTION for site in sites):
            raise ValueError(f"{self} needs cross-attention; {model} has none. GuidanceStop works on this model.")

    @property
    def reads_timestep(self) -> bool:  # type: ignore[override]
        """Only where the gate is a threshold."""
        return is_threshold(self.gate_step)

    def gate(self, step: Step) -> int:
        """m in the schedule of this step."""
        m = settle(self.gate_step, step, self)
        if m > step.count:
            raise ValueError(
                f"{self} has its gate at step {m}, but only {step.count} steps are executed: choose a gate of at most "
                f"{step.count}, or a fraction such as gate_step=0.4."
            )
        return m

    def remark(self, step: Step, notes: Mapping[str, Any]) -> str:  # noqa: ARG002
        """Which step the gate is, and how long the interval."""
        interval = settle(self.sp_interval, step, self)
        reused = f"TGate: sp_interval={self.sp_interval} is {interval} of {step.count} steps"
        remarks = (told(self, "gate_step", step, self.gate(step)), reused if interval != self.sp_interval else "")
        return "\n".join(filter(None, remarks))

    def decide(self, site: Site, step: Step) -> Decision | None:
        """The table of section 2 of the paper's schedule."""
        if step.branches > 2:
            raise ValueError(
                f"{self} averages two guidance branches; this pipeline's batch has {step.branches}. GuidanceStop "
                "works on it, unless perturbed-attention guidance is on."
            )
        m, s = self.gate(step), step.index
        if site.kind is Kind.MODEL:
            return drop_guidance(step) if s >= m else None
        keep = _ANCHORS[self.anchor] if site.kind is Kind.CROSS_ATTENTION else branch_mean
        if s == m - 1:
            return keep_of_both(keep, step)
        if site.kind is Kind.CROSS_ATTENTION:
            return reuse_of_both(keep) if s >= m else None
        if s >= m:
            return Compute(whole, shared=True) if s % self.fi_interval == 0 else reuse_of_both(whole)
        if s < self.warm_up:
            return None
        return Compute(whole) if s == self.warm_up or s % settle(self.sp_interval, step, self) == 0 else Reuse()

    def renews(self, step: Step) -> bool:
        """At the gate step, so that all attention is kept, and at the next if the batch shrinks there."""
        m = self.gate(step)
        return step.index == m - 1 < step.count - 1 or (step.index == m and step.branches > 1)
