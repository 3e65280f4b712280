"""How many tokens are computed anew where and when, between which full steps: the constants of ToCa's authors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import inf, isfinite
from typing import TypeVar

from ..ranges import at_least
from ..site import TOGETHER, Kind, Site

_Number = TypeVar("_Number", float, Fraction)


def _numbers(words: str, fits: Callable[[float], bool], **fields: float) -> None:
    """Every field is a number that fits; raises TypeError and ValueError as `Schedule` does."""
    for name, value in fields.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not fits(value):
            raise ValueError(f"{name} must be {words}, got {value}")


@dataclass(frozen=True, slots=True)
class Schedule:
    """How much is refreshed where and when: the constants of one of the authors' implementations.

    A slope w means the factor 1 + w - 2 w p, with the position p = s / steps, or block / last block. Steps s count down
    to 0 or up from 0.

    Attributes:
        counts_down: whether s is steps - 1 at the first step, and 0 at the last; else the other way round.
        steps, blocks: slopes of the share of tokens over the run, and over the depth.
        cross, mlp: factors of that share in cross-attention and in the MLP, at least 0.
        cycle: slope of the distance of full steps, which divides the interval; above -1 and below 1.
        window: (start, end) as fractions s / steps, between which every second step is full; empty for nowhere.
        bonus, cell: by how much, at least 0, the best of every cell x cell tokens is favoured; a cell is at least 1.
        shared: whether all guidance branches refresh the same tokens.
        parallel: factor of that share in blocks whose attention and MLP share a projection, at least 0.
        last: what the number of a block is divided by, counted in its own list; 0 for the number of the last one.
        warm_up: how many steps, at least 1, are full at the start; where it is more than 1, full steps follow it by the
            interval.

    Raises:
        ValueError: a field out of range.
        TypeError: a field of the wrong type.
    """

    counts_down: bool
    steps: float
    blocks: float
    cross: float
    mlp: float
    cycle: float
    window: tuple[float, ...]
    bonus: float
    cell: int
    shared: bool
    parallel: float = 0.0
    last: int = 0
    warm_up: int = 1

    def __post_init__(self) -> None:
        for name, value in (("counts_down", self.counts_down), ("shared", self.shared)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        _numbers("finite", isfinite, steps=self.steps, blocks=self.blocks)
        factors = {"cross": self.cross, "mlp": self.mlp, "parallel": self.parallel}
        _numbers("at least 0 and finite", lambda value: 0 <= value < inf, bonus=self.bonus, **factors)
        _numbers("above -1 and below 1", lambda value: -1 < value < 1, cycle=self.cycle)
        at_least(1, cell=self.cell, warm_up=self.warm_up)
        at_least(0, last=self.last)
        object.__setattr__(self, "window", tuple(self.window))
        _numbers("in [0, 1]", lambda value: 0 <= value <= 1, **{f"window[{i}]": p for i, p in enumerate(self.window)})
        if self.window and not (len(self.window) == 2 and self.window[0] < self.window[1]):
            raise ValueError(f"window must be (start, end) with start < end, or empty for none, got {self.window}")

    def of(self, site: Site) -> float:
        """The factor of a site's module."""
        if site.parallel:
            return self.parallel if site.kind in TOGETHER else 0.0
        return {Kind.CROSS_ATTENTION: self.cross, Kind.MLP: self.mlp}.get(site.kind, 0.0)


SCHEDULES: Mapping[str, Schedule] = {
    "dit-ddim": Schedule(True, 2.0, -0.2, 0.0, 2.5, 0.4, (0.2, 0.4), 0.6, 2, shared=False),
    "dit-ddpm": Schedule(True, 0.4, 0.8, 0.0, 2.5, 0.4, (0.2, 0.4), 0.6, 2, shared=False),
    "pixart": Schedule(False, 0.9, 0.6, 0.6, 1.6, -0.2, (), 0.4, 4, shared=True),
    "flux": Schedule(False, 0.0, 0.5, 0.0, 0.4, 0.0, (), 0.0, 1, shared=False, parallel=1.6, last=27, warm_up=3),
}


def factor(slope: _Number, position: _Number) -> _Number:
    """1 + w - 2 w p."""
    return 1 + slope - 2 * slope * position


@cache
def full_steps(steps: int, interval: int, fixed: Schedule, varied: bool) -> tuple[int, ...]:
    """A step is full if s is divisible by the present distance and also by the one it sets for what follows.

    The authors' code lets the first block compute where only the former holds, and the others not; here such a step is
    not full. One more difference: an interval of 1 makes every step full, whatever the distance is rounded to. The
    constants are taken as the decimal numbers they are written as, so that halves are halves and go to the even number.
    """
    if interval == 1:
        return tuple(range(steps))
    if fixed.warm_up > 1:
        return (*range(min(fixed.warm_up, steps)), *range(fixed.warm_up - 1 + interval, steps, interval))
    cycle, *window = (Fraction(str(number)) for number in (fixed.cycle, *fixed.window))
    full, distance = [], interval
    for i in range(steps):
        s = steps - 1 - i if fixed.counts_down else i
        if i and s % distance:
            continue
        distance = interval
        if varied:
            p = Fraction(s, steps)
            inside = bool(window) and window[0] <= p < window[1]
            distance = 2 if inside else max(1, round(interval / factor(cycle, p)))
        if i == 0 or s % distance == 0:
            full.append(i)
    return tuple(full)
