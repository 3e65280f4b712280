"""The window in which guidance is on, for a schedule that is known."""

import math
from typing import NamedTuple

from ..clock import Step
from ..position import Position, is_threshold, settle
from ..ranges import one_of


class Edges(NamedTuple):
    """The first step of a window, and the first after it."""

    start: int
    end: int


def check_window(start: Position, end: Position, window: str) -> None:
    """Both ends are steps, fractions in [0, 1] or thresholds, the first before the second.

    Raises:
        ValueError: they are not.
    """
    one_of("window", window, ("steps", "timestep"))
    for name, value in (("start", start), ("end", end)):
        if is_threshold(value):
            continue
        if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, Timestep(t) or Sigma(s), got {value}")
        if isinstance(value, float) and value > 1:
            raise ValueError(f"{name} as a fraction must lie in [0, 1], got {value}")
    if window == "timestep" and not all(_is_fraction(value) for value in (start, end)):
        raise ValueError(
            f'window="timestep" counts fractions of the range of timesteps, got start={start} and end={end}; '
            'Timestep(t), Sigma(s) and steps go with window="steps".'
        )
    if type(start) is type(end) and _reversed(start, end) and (start, end) != (0, 0):
        raise ValueError(f"start must be before end (or both 0 for off), got {start} and {end}")


def _is_fraction(value: Position) -> bool:
    return not is_threshold(value) and 0 <= value <= 1  # type: ignore[operator]


def _reversed(start: Position, end: Position) -> bool:
    """Whether nothing lies between; thresholds fall from step to step."""
    if isinstance(start, int | float) and isinstance(end, int | float):
        return start >= end
    assert not isinstance(start, int | float)
    assert not isinstance(end, int | float)
    return start.value <= end.value


def edges(start: Position, end: Position, step: Step, method: object) -> Edges:
    """The window in the schedule of a step: of fractions the floor and the ceiling, of thresholds the first below.

    Raises:
        ValueError: a threshold, but neither timesteps nor noise levels are known.
    """
    return Edges(
        math.floor(start * step.count) if isinstance(start, float) else settle(start, step, method, minimum=0),
        math.ceil(end * step.count) if isinstance(end, float) else settle(end, step, method, minimum=0),
    )


def in_range(timestep: float, start: float, end: float, flow: bool) -> bool:
    """The rule of the authors' code, for fractions of the range of timesteps.

    Guided until t falls below (1 - end) of the range, which is cut to whole timesteps but in rectified flows.
    """
    if flow:
        first, last = (1 - start) * 1000, (1 - end) * 1000
    else:
        first, last = math.ceil((1 - start) * 999), math.floor((1 - end) * 999)
    return last <= timestep and (timestep <= first or start == 0)
