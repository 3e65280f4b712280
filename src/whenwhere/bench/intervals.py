"""How far a number would move with other prompts: 95 % intervals by the bootstrap (Efron, 1979).

Resampled are prompts, each with all its seeds, since pictures of one prompt are alike; with fewer than `ENOUGH` prompts
single pairs of prompt and seed. The interval holds the middle 95 % of the statistic over the resamples (the percentile
interval); the generator is seeded, so that a report is the same every time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Numbers: TypeAlias = npt.NDArray[np.float64]
Case: TypeAlias = tuple[str, int]  # prompt and seed
Statistic = Callable[..., Numbers]  # columns (..., U, S), NaN where there is no value -> (...)

RESAMPLES = 2000
ENOUGH = 5  # prompts
_AT_ONCE = 2_000_000  # numbers in memory


@dataclass(frozen=True)
class Interval:
    """A number with the ends of its 95 % interval; both `None` where there is but one case to resample."""

    value: float
    low: float | None
    high: float | None


def middle(values: Numbers) -> Numbers:
    """The median over cases."""
    found: Numbers = np.nanmedian(values, axis=(-2, -1))
    return found


def mean(values: Numbers) -> Numbers:
    """The mean over cases."""
    found: Numbers = np.nanmean(values, axis=(-2, -1))
    return found


def ratio(plain: Numbers, other: Numbers) -> Numbers:
    """How many times smaller the median of the second is: the speed-up, for seconds."""
    return middle(plain) / middle(other)


def unit_of(cases: Mapping[Case, float]) -> str:
    """What is resampled."""
    return "prompts" if len({prompt for prompt, _ in cases}) >= ENOUGH else "pairs of prompt and seed"


def bootstrap(statistic: Statistic, *columns: Mapping[Case, float]) -> Interval:
    """A statistic of one or several columns of values by case, and its interval.

    All columns are resampled together. What is infinite stays so: the median of mostly identical pictures is infinite.
    """
    tables = _tables(columns)
    value = float(statistic(*tables))
    units = tables[0].shape[0]
    if units < 2:
        return Interval(value, None, None)
    generator = np.random.default_rng(0)
    part = max(1, _AT_ONCE // tables[0].size)
    found: list[Numbers] = []
    for start in range(0, RESAMPLES, part):
        chosen = generator.integers(units, size=(min(part, RESAMPLES - start), units))
        found.append(statistic(*(table[chosen] for table in tables)))
    low, high = np.quantile(np.concatenate(found), (0.025, 0.975), method="nearest")
    return Interval(value, float(low), float(high))


def _tables(columns: tuple[Mapping[Case, float], ...]) -> list[Numbers]:
    """Every column as (U, S): a row for every unit, NaN where a prompt has fewer seeds than another."""
    cases = [case for case in columns[0] if all(case in column for column in columns)]
    if not cases:
        raise ValueError("no prompt and seed has been run by all that is compared.")
    if unit_of(dict.fromkeys(cases, 0.0)) != "prompts":
        return [np.array([[column[case]] for case in cases], dtype=np.float64) for column in columns]
    prompts: dict[str, list[Case]] = {}
    for case in cases:
        prompts.setdefault(case[0], []).append(case)
    width = max(map(len, prompts.values()))

    def row(column: Mapping[Case, float], own: list[Case]) -> list[float]:
        return [column[case] for case in own] + [float("nan")] * (width - len(own))

    return [np.array([row(column, own) for own in prompts.values()], dtype=np.float64) for column in columns]
