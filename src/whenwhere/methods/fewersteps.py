"""Fewer steps: the plainest way to compute less, and the baseline every method must be compared with at equal cost."""

from dataclasses import dataclass

from ..ranges import at_least


@dataclass(frozen=True)
class FewerSteps:
    """Run the plain pipeline with fewer inference steps.

    It is no method and is not attached: pass `num_inference_steps=steps` to the pipeline. `compare` runs it as a row.

    Attributes:
        steps: inference steps, at least 1.

    Raises:
        ValueError: `steps` below 1.
        TypeError: `steps` is no whole number.
    """

    steps: int

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps)
