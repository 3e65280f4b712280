"""Plain "stop guidance at step m": the baseline of every claim about T-GATE.

From step m on the denoiser runs on the conditional branch alone; nothing is kept or reused. Limiting guidance to a
part of the schedule was studied by Kynkäänniemi et al., 2024 (https://arxiv.org/abs/2404.07724).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..anatomy import Role
from ..clock import Step
from ..decision import Decision
from ..decisions.branches import drop_guidance
from ..position import FromStep, Position
from ..ranges import one_of
from ..site import Kind, Site


@dataclass(frozen=True)
class GuidanceStop(FromStep):
    """Stop classifier-free guidance after m evaluations.

    Where guidance is a second call of the denoiser, that call is answered with what the first one returned.

    Attributes:
        step: m, evaluations with guidance, at least 1; a float in (0, 1) is a fraction of the executed schedule,
            rounded; at `Timestep(t)` or `Sigma(s)` guidance stops with the first step below it.
        branch: the branch that goes on, "conditional" or "unconditional". Separate calls go on with the conditional.

    Raises:
        ValueError: a field out of range, here or when the number of steps is known.
        TypeError: `step` is no position.
    """

    step: Position = 10
    branch: Literal["conditional", "unconditional"] = "conditional"

    kinds: ClassVar = frozenset({Kind.MODEL})
    does: ClassVar = "stops guidance"
    idle_reason: ClassVar = (
        "guidance was off, or stops only after the last step. Where the pipeline does not tell (DiTPipeline), say "
        "attach(..., guidance=True)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("branch", self.branch, ("conditional", "unconditional"))

    def check(self, sites: Sequence[Site], model: str) -> None:
        """Every denoiser will do."""

    def decide(self, site: Site, step: Step) -> Decision | None:  # noqa: ARG002
        """One branch from step m on."""
        return drop_guidance(step, Role(self.branch)) if step.index >= self.first(step) else None

    def renews(self, step: Step) -> bool:
        """Where the batch shrinks."""
        return step.index == self.first(step) and step.branches > 1
