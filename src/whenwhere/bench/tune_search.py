"""The search: plans are filtered by multiply-adds, what remains is drawn, and Optuna proposes what to try next.

Optuna's sampler is the tree-structured Parzen estimator (Bergstra et al., 2011). Published defaults and the schedules
of least drift are proposed first. Where a cost is asked for, the one knob of every method that sets it is turned to it
by planning alone, and only the others are searched.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .forms import Form, Real, Values
from .studio import Studio

NEAR = 0.12  # how far from a cost a setting may be, relatively, to stand for it
_SLACK = 1.25  # what saves so many times more than was asked for is not drawn
_PLANS = 6  # proposals for every variant that may be drawn
_MISFIT = -1000.0
_SEED = 0


@dataclass(frozen=True)
class Goal:
    """What is wanted.

    Attributes:
        kind: a speed-up by the clock, so many times fewer multiply-adds, or a PSNR against the plain pictures in dB.
        value: above 1 for the first two, above 0 for the third.
    """

    kind: Literal["speedup", "macs", "psnr"]
    value: float

    def __post_init__(self) -> None:
        least = 0.0 if self.kind == "psnr" else 1.0
        if not least < self.value < math.inf:
            raise ValueError(f"{self.kind} must be above {least:g}, got {self.value}.")

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}"


@dataclass(frozen=True)
class Candidate:
    """What was drawn: an expression, its planned ratio of multiply-adds and its PSNR."""

    text: str
    ratio: float
    quality: float


def search(
    studio: Studio, forms: Sequence[Form], goal: Goal, aim: float, trials: int, watch: Callable[[str], None]
) -> list[Candidate]:
    """What reaches the goal, the best first: by quality, or for a floor of quality by multiply-adds.

    Args:
        studio: plans and draws.
        forms: what may be tried.
        goal: what is wanted.
        aim: how many times fewer multiply-adds are asked for; not read where the goal is a floor.
        trials: variants that are drawn at most.
        watch: is told what is drawn next.

    Raises:
        ImportError: Optuna is not installed.
    """
    optuna = require()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=_SEED))
    able = {form.name: form for form in forms if turn(studio, form, form.lows() | dict(form.start), aim) is not None}
    if not able:
        return []
    for form in able.values():
        begin = {f"{form.name}.{name}": value for name, value in form.start.items() if name != form.cost}
        study.enqueue_trial({"method": form.name, **begin})
    found: dict[str, Candidate] = {}
    begun = studio.drawn
    for _ in range(_PLANS * trials):
        if studio.drawn - begun >= trials:
            break
        trial = study.ask()
        form = able[trial.suggest_categorical("method", list(able))]
        values = _suggest(trial, form, goal)
        turned = values if goal.kind == "psnr" else turn(studio, form, values, aim)
        text = form.write(turned) if turned is not None else ""
        study.tell(trial, _score(studio, text, goal, aim, found, watch))
    return sorted(found.values(), key=lambda c: c.ratio if goal.kind == "psnr" else c.quality, reverse=True)


def nearest(studio: Studio, form: Form, aim: float) -> Values | None:
    """What a form starts with, at the cost that is nearest to a ratio; `None` where none is near."""
    ways = _bracket(studio, form, form.lows() | dict(form.start), aim)
    ratio, values = min(ways, key=lambda way: abs(way[0] - aim))
    return values if abs(ratio / aim - 1) <= NEAR else None


def turn(studio: Studio, form: Form, values: Values, aim: float) -> Values | None:
    """Values with the knob of the cost turned until just as much is saved as asked for; `None` where it cannot."""
    enough = [way for way in _bracket(studio, form, values, aim) if way[0] >= aim]
    return min(enough, key=lambda way: way[0])[1] if enough else None


def _bracket(studio: Studio, form: Form, values: Values, aim: float) -> list[tuple[float, Values]]:
    """The two neighbouring settings of the knob of the cost around a ratio, with their ratios (0: does not fit).

    The saving rises or falls with the knob, so that they are found by bisection.
    """
    settings = form.settings()

    def way(index: int) -> tuple[float, Values]:
        own = {**values, form.cost: settings[index]}
        return studio.ratio(form.write(own)) or 0.0, own

    low, high = 0, len(settings) - 1
    rising = way(high)[0] > way(low)[0]
    while high - low > 1:
        middle = (low + high) // 2
        if (way(middle)[0] < aim) == rising:
            low = middle
        else:
            high = middle
    return [way(low), way(high)]


def require() -> Any:
    """Optuna.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise ImportError(f"tuning needs Optuna: pip install 'whenwhere[tune]' ({error})", name="optuna") from error


def _suggest(trial: Any, form: Form, goal: Goal) -> Values:
    """What Optuna proposes; the knob of the cost only where no cost is asked for."""
    return {
        knob.name: trial.suggest_float(f"{form.name}.{knob.name}", knob.low, knob.high, log=True)
        if isinstance(knob, Real)
        else trial.suggest_int(f"{form.name}.{knob.name}", knob.low, knob.high)
        for knob in form.knobs
        if goal.kind == "psnr" or knob.name != form.cost
    }


def _score(
    studio: Studio, text: str, goal: Goal, aim: float, found: dict[str, Candidate], watch: Callable[[str], None]
) -> float:
    """What Optuna is told; positive only for what reaches the goal, which is noted in `found`."""
    ratio = studio.ratio(text) if text else None
    if ratio is None:
        return _MISFIT
    if goal.kind != "psnr":
        if not aim <= ratio <= aim * _SLACK:
            return -100 * abs(math.log(ratio / aim))
    elif ratio <= (best := max((candidate.ratio for candidate in found.values()), default=1.0)):
        return ratio / best - 1  # no cheaper than what is good enough: not drawn
    watch(f"drawing with {text}")
    quality = studio.quality(text)
    if goal.kind == "psnr" and quality < goal.value:
        return quality - goal.value
    found[text] = Candidate(text, ratio, quality)
    return ratio if goal.kind == "psnr" else quality
