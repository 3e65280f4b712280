"""Plain "stop guidance at step m": the baseline of every claim about T-GATE.

From step m on the denoiser runs on the conditional branch alone; nothing is kept or reused. Limiting guidance to a
part of the schedule was studied by Kynkäänniemi et al., 2024 (https://arxiv.org/abs/2404.07724).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..anatomy import Role
from ..branches import OneBranch, first_call, second_call
from ..clock import Step
from ..decision import Decision
from ..method import Method
from ..ranges import position
from ..site import Kind, Site


@dataclass(frozen=True)
class GuidanceStop(Method):
    """Stop classifier-free guidance after m evaluations.

    Where guidance is a second call of the denoiser, that call is answered with what the first one returned.

    Attributes:
        step: m, evaluations with guidance, at least 1; a float in (0, 1) is a fraction of the executed schedule,
        rounded.

    Raises:
        ValueError: `step` out of range, here or when the number of steps is known.
        TypeError: `step` is no number.
    """

    step: int | float = 10

    kinds: ClassVar = frozenset({Kind.MODEL})
    idle_reason: ClassVar = (
        "guidance was off, or stops only after the last step. Where the pipeline does not tell (DiTPipeline), say "
        "attach(..., guidance=True)."
    )

    def __post_init__(self) -> None:
        position("step", self.step, minimum=1)

    def check(self, sites: Sequence[Site], model: str) -> None:
        """Every denoiser will do."""

    def decide(self, site: Site, step: Step) -> Decision | None:  # noqa: ARG002
        """One branch from step m on."""
        m = max(1, round(self.step * step.count)) if isinstance(self.step, float) else self.step
        if m > step.count:
            raise ValueError(f"{self} stops guidance at step {m}, but only {step.count} steps are executed.")
        if step.index < m:
            return None
        if step.branches > 1:
            return OneBranch(Role.CONDITIONAL)
        return first_call if step.pass_ == 0 else second_call

    def renews(self, step: Step) -> bool:
        """Where the batch shrinks."""
        m = max(1, round(self.step * step.count)) if isinstance(self.step, float) else self.step
        return step.index == m and step.branches > 1
