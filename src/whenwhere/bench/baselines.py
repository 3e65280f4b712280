"""The two plain ways to compute as little as a method does: fewer steps, and stopping guidance."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from ..decisions.branches import OneBranch
from ..methods import FewerSteps, GuidanceStop, TGate
from ..site import Kind
from .price import Price
from .schedulers import evaluations
from .variant import PLAIN, Task, Variant


def baselines(task: Task, variant: Variant, prices: Mapping[Variant, Price]) -> list[Variant]:
    """The baselines of a variant at equal cost, as far as they are not the variant itself or the plain run.

    Fewer steps: the count whose multiply-adds are closest to the variant's. Guidance stopped: at the gate of T-GATE,
    which compares at equal guidance; for other methods at the step whose multiply-adds are closest.
    """
    found = [fewer_steps(task, prices[variant], prices[PLAIN]), guidance_stop(variant, prices[variant], prices[PLAIN])]
    return [Variant((item,)) for item in found if item is not None and variant.items != (item,)]


def fewer_steps(task: Task, price: Price, plain: Price) -> FewerSteps | None:
    """As many steps as cost most nearly the same; `None` where that is all of them."""
    scheduler = task.model.pipeline.scheduler
    each = plain.planned.all / plain.evaluations
    offered = {steps: _evaluations(scheduler, steps) for steps in range(1, task.steps + 1)}
    able = {steps: found * each for steps, found in offered.items() if found is not None}
    steps = _nearest(price.planned.all, able.__getitem__, able)
    return FewerSteps(steps) if steps < task.steps else None


def guidance_stop(variant: Variant, price: Price, plain: Price) -> GuidanceStop | None:
    """Guidance stopped at the same gate or at the nearest cost; `None` without guidance, or where it never stops."""
    if plain.branches == 1 or any(isinstance(item, GuidanceStop) for item in variant.items):
        return None
    if any(isinstance(item, TGate) for item in variant.items):
        step = _dropped(price)
    else:
        step = _nearest(price.planned.all, partial(_cost_of_stopping, plain), range(1, plain.evaluations + 1))
    return GuidanceStop(step) if step < plain.evaluations else None


def _dropped(price: Price) -> int:
    """The step from which on one branch runs; the end where none is dropped."""
    found = price.plan.row("", Kind.MODEL).find(OneBranch.symbol)
    return price.evaluations if found < 0 else found


def _evaluations(scheduler: Any, steps: int) -> int | None:
    """Evaluations for so many steps; `None` where the scheduler cannot run so few or so many."""
    try:
        return evaluations(scheduler, steps)
    except ValueError:
        return None


def _cost_of_stopping(plain: Price, step: int) -> float:
    """Multiply-adds when one branch runs from a step on."""
    each = plain.planned.all / plain.evaluations
    return each * (step + (plain.evaluations - step) / plain.branches)


def _nearest(wanted: int, cost: Callable[[int], float], choices: Iterable[int]) -> int:
    return min(choices, key=lambda choice: abs(cost(choice) - wanted))
