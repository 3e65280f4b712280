"""Adaptive T-GATE: the gate of T-GATE (Liu et al., 2024, https://arxiv.org/abs/2404.02747) decided while generating.

T-GATE rests on the observation that the outputs of cross-attention converge within a few steps (section 3 and figure 1
of the paper); when, depends on the prompt and the seed, and the paper sets one step for all. Here the change from step
to step is measured, and the gate closes at the first step of a window at which it is small. This is ours, not the
authors'.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from ..clock import Step
from ..decision import Compute, Decision
from ..decisions.branches import OneBranch
from ..decisions.convergence import Frozen, Undecided, Watch, all_closed
from ..decisions.sketches import Sketch
from ..method import Method
from ..position import Position, is_threshold, position, settle
from ..site import Kind, Site


@dataclass(frozen=True)
class AdaptiveTGate(Method):
    """T-GATE that closes its gate when cross-attention has converged.

    Every sample has its own gate, so it does not depend on what else is in the batch; the second guidance branch is
    saved from the step on at which all gates of a batch are closed. Self-attention is left alone.

    Attributes:
        threshold: at least 0: the gate closes when the outputs of cross-attention, the mean of both branches, change by
            at most threshold / steps of their length in one step, on the average over all cross-attentions. 0 waits
            for `max_step` unless nothing changes at all, infinity takes `min_step`.
        min_step: the earliest gate, at least 2: evaluations with guidance and computed cross-attention. A position: a
            step, a fraction in (0, 1), `Timestep(t)` or `Sigma(s)`.
        max_step: the latest gate, where it closes in any case. The number of steps lets it stay open.

    Raises:
        ValueError: a field out of range, here or when the number of steps is known; guidance by separate calls of the
            denoiser.
        TypeError: a field of the wrong type.
    """

    threshold: float = 2.0
    min_step: Position = 0.2
    max_step: Position = 0.6

    kinds: ClassVar = frozenset({Kind.MODEL, Kind.CROSS_ATTENTION})
    lasting: ClassVar = True
    adaptive: ClassVar = True
    idle_reason: ClassVar = "the gate may close only after the last step; choose a smaller min_step."

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, int | float) or isinstance(self.threshold, bool):
            raise TypeError(f"threshold must be a number, got {self.threshold!r}")
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {self.threshold}")
        position("min_step", self.min_step, minimum=2)
        position("max_step", self.max_step, minimum=2)

    @property
    def reads_timestep(self) -> bool:  # type: ignore[override]
        """Only where a bound is a threshold."""
        return is_threshold(self.min_step) or is_threshold(self.max_step)

    def check(self, sites: Sequence[Site], model: str) -> None:
        """It needs cross-attention."""
        if not any(site.kind is Kind.CROSS_ATTENTION for site in sites):
            raise ValueError(f"{self} needs cross-attention; {model} has none. GuidanceStop works on this model.")

    def bounds(self, step: Step) -> tuple[int, int]:
        """The earliest and the latest gate in the schedule of this step."""
        low, high = (settle(bound, step, self, minimum=2) for bound in (self.min_step, self.max_step))
        if not low <= high <= step.count:
            raise ValueError(
                f"{self} may close its gate between steps {low} and {high} of {step.count}: min_step must be at most "
                "max_step, and that at most the number of steps."
            )
        return low, high

    def decide(self, site: Site, step: Step) -> Decision | None:
        """What is done if the gate closes at the latest."""
        if step.branches > 2:
            raise ValueError(
                f"{self} averages two guidance branches; this pipeline's batch has {step.branches}. GuidanceStop "
                "works on it, unless perturbed-attention guidance is on."
            )
        if step.branches == 1 and step.pass_:
            raise ValueError(
                f"{self} compares what a guidance batch puts out from step to step; this pipeline guides by separate "
                "calls of its denoiser. TGate works on it, and so does GuidanceStop."
            )
        (low, high), s = self.bounds(step), step.index
        if low == step.count:
            return None
        judged = low - 1 <= s < high
        if site.kind is Kind.MODEL:
            if s >= high:
                return OneBranch() if step.branches > 1 else None
            return Undecided(judged and not step.last, final=s == high - 1) if s >= low - 1 else None
        if s >= high:
            return Frozen(step.branches)
        if s == low - 2:
            return Sketch(step.branches)
        return Watch(step.branches, judged) if judged else None

    def revise(self, decision: Decision, step: Step, notes: Mapping[str, Any]) -> Decision:
        """What is done if all gates are closed."""
        if not all_closed(notes, step.index):
            return decision
        if isinstance(decision, Undecided):
            return OneBranch() if step.branches > 1 else Compute()
        return Frozen(step.branches) if isinstance(decision, Watch) else decision

    def cheapest(self) -> Self:
        """The gate at its earliest."""
        return replace(self, max_step=self.min_step)

    def remark(self, step: Step, notes: Mapping[str, Any]) -> str:
        """The window, or the gates that were found."""
        low, high = self.bounds(step)
        if not notes:
            return f"AdaptiveTGate: the gate closes between steps {low} and {high} of {step.count}; drawn at the latest"
        gates = ("open" if gate is None else str(gate) for gate in notes.get("gates", ()))
        return f"AdaptiveTGate: gates at {', '.join(gates)} of {step.count}"

    def renews(self, step: Step) -> bool:
        """While the gate is open in its window, so that all cross-attention is reached, and where the batch shrinks."""
        low, high = self.bounds(step)
        if low == step.count:
            return False
        return low - 2 <= step.index < high or (step.index == high and step.branches > 1)
