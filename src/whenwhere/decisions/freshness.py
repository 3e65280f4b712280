"""How many tokens are computed anew where and when, between which full steps: the constants of ToCa's authors."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from ..site import TOGETHER, Kind, Site


@dataclass(frozen=True, slots=True)
class Schedule:
    """How much is refreshed where and when: the constants of one of the authors' implementations.

    A slope w means the factor 1 + w - 2 w p, with the position p = s / steps, or block / last block. Steps s count down
    to 0 or up from 0.

    Attributes:
        counts_down: whether s is steps - 1 at the first step, and 0 at the last; else the other way round.
        steps, blocks: slopes of the share of tokens over the run, and over the depth.
        cross, mlp: factors of that share in cross-attention and in the MLP.
        cycle: slope of the distance of full steps, which divides the interval.
        window: where, as fractions s / steps, every second step is full; empty for nowhere.
        bonus, cell: by how much the best of every cell x cell tokens is favoured.
        shared: whether all guidance branches refresh the same tokens.
        parallel: factor of that share in blocks whose attention and MLP share a projection.
        last: what the number of a block is divided by, counted in its own list; 0 for the number of the last one.
        warm_up: how many steps are full at the start; where it is more than 1, full steps follow it by the interval.
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


def factor(slope: float, position: float) -> float:
    """1 + w - 2 w p."""
    return 1 + slope - 2 * slope * position


@cache
def full_steps(steps: int, interval: int, fixed: Schedule, varied: bool) -> tuple[int, ...]:
    """A step is full if s is divisible by the present distance and also by the one it sets for what follows.

    The authors' code lets the first block compute where only the former holds, and the others not; here such a step is
    not full. One more difference: an interval of 1 makes every step full, whatever the distance is rounded to.
    """
    if fixed.warm_up > 1 and interval > 1:
        return (*range(min(fixed.warm_up, steps)), *range(fixed.warm_up - 1 + interval, steps, interval))
    full, distance = [], interval
    for i in range(steps):
        s = steps - 1 - i if fixed.counts_down else i
        if i and s % distance:
            continue
        inside = varied and bool(fixed.window) and fixed.window[0] * steps <= s < fixed.window[1] * steps
        cycle = fixed.cycle if varied else 0.0
        distance = 2 if inside else max(1, round(interval / factor(cycle, s / steps)))
        if i == 0 or s % distance == 0:
            full.append(i)
    return tuple(range(steps)) if interval == 1 else tuple(full)
