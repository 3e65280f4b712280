"""Positions in the schedule: a step, a share of the steps, a timestep, a noise level.

A method's field may be any of them. Which step of the executed schedule it is follows once that schedule is known, and
only from it, so the same words fit every number of steps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from . import ranges
from .clock import Step
from .method import Method


@dataclass(frozen=True, slots=True, repr=False)
class Timestep:
    """The first step whose timestep is below this value.

    Attributes:
        value: at least 0, in the units of the scheduler: 0 ... 1000 in those of diffusers, also of flow matching.
    """

    value: float

    def __post_init__(self) -> None:
        _finite("Timestep", self.value)

    def __repr__(self) -> str:
        return f"Timestep({self.value})"


@dataclass(frozen=True, slots=True, repr=False)
class Sigma:
    """The first step whose noise level is below this value.

    Attributes:
        value: at least 0. Where signal and noise mix with weights a and b, b / a; in flow matching the share of noise,
            in [0, 1].
    """

    value: float

    def __post_init__(self) -> None:
        _finite("Sigma", self.value)

    def __repr__(self) -> str:
        return f"Sigma({self.value})"


Position = int | float | Timestep | Sigma


def is_threshold(value: object) -> bool:
    """Whether a position needs the timesteps of the schedule to be found."""
    return isinstance(value, Timestep | Sigma)


def position(name: str, value: Position, minimum: int = 0) -> None:
    """A step as a whole number of at least `minimum`, a fraction of the schedule in (0, 1), or a threshold.

    Raises:
        TypeError: it is none of them.
        ValueError: it is out of range.
    """
    if not isinstance(value, Timestep | Sigma):
        ranges.position(name, value, minimum)


def settle(value: Position, step: Step, method: object, minimum: int = 1) -> int:
    """The step that a position is in the schedule of `step`, in minimum ... count.

    A fraction is rounded. A threshold that no step lies below is the end of the schedule, where nothing begins any
    more; one that all lie below is `minimum`.

    Raises:
        ValueError: a threshold, but neither timesteps nor noise levels are known.
    """
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return max(minimum, round(value * step.count))
    levels = step.timesteps if isinstance(value, Timestep) else step.sigmas
    below = [i for i, level in enumerate(levels) if level is not None and level < value.value]
    if not levels or any(level is None for level in levels):
        what = "timesteps" if isinstance(value, Timestep) else "noise levels"
        raise ValueError(
            f"{method} goes by {what}, and none are known: plan(..., scheduler=one whose set_timesteps was called), or "
            "give a step or a fraction."
        )
    return max(minimum, below[0]) if below else step.count


def told(method: object, name: str, step: Step, settled: int) -> str:
    """What a plan says of a position that is no number of steps; nothing where it is one."""
    value = getattr(method, name)
    return (
        "" if isinstance(value, int) else f"{type(method).__name__}: {name}={value} is step {settled} of {step.count}"
    )


class FromStep(Method):
    """A method that does one thing from a step of the schedule on."""

    step: Position  # m: evaluations before it
    does: ClassVar[str]  # from then on, for its errors

    def __post_init__(self) -> None:
        position("step", self.step, minimum=1)

    @property
    def reads_timestep(self) -> bool:  # type: ignore[override]
        """Only where the step is a threshold."""
        return is_threshold(self.step)

    def first(self, step: Step) -> int:
        """m in the schedule of this step.

        Raises:
            ValueError: it lies behind the last step.
        """
        m = settle(self.step, step, self)
        if m > step.count:
            raise ValueError(f"{self} {self.does} at step {m}, but only {step.count} steps are executed.")
        return m

    def remark(self, step: Step, notes: Mapping[str, Any]) -> str:  # noqa: ARG002
        """Which step it is."""
        return told(self, "step", step, self.first(step))


def _finite(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")
