"""A comparison: plain, methods, and for each method the two baselines at equal cost, on the same prompts and seeds."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..planning import plan
from .baselines import baselines
from .environment import Environment
from .price import Price, price
from .rows import Row
from .run import Watch, cases, measure
from .summary import Summary, summarise
from .variant import PLAIN, Task, Variant


@dataclass(frozen=True)
class Comparison:
    """What was compared, and how it went.

    Attributes:
        task: prompts, seeds and settings.
        groups: every method asked for, with its baselines.
        prices: of every variant.
        rows: all measured runs.
        pictures: (3, H, W), by variant, prompt and seed.
        environment: where it was measured.
    """

    task: Task
    groups: dict[Variant, list[Variant]]
    prices: dict[Variant, Price]
    rows: list[Row]
    pictures: dict[tuple[Variant, str, int], Tensor]
    environment: Environment

    @property
    def heading(self) -> str:
        """The model and the settings in one line."""
        scheduler = type(self.task.model.pipeline.scheduler).__name__.removesuffix("Scheduler")
        return f"{self.task.model.name}, {self.task.steps} steps, {scheduler}, guidance {self.task.guidance:g}"

    def summaries(self) -> dict[Variant, Summary]:
        """Medians and ratios of every variant."""
        found = {summary.method: summary for summary in summarise(self.rows)}
        return {variant: found[variant.expression] for variant in self.prices}


def compare(task: Task, asked: Sequence[Variant], watch: Watch = lambda _: None) -> Comparison:
    """Price all variants, find the baselines, and run everything in turns.

    Args:
        task: prompts, seeds and settings.
        asked: the variants to compare with the plain run.
        watch: is told before every run.

    Raises:
        ValueError: a method does not fit the model or the steps; nothing has run then.
    """
    groups, prices = price_all(task, asked, watch)
    comparison = Comparison(task, groups, prices, [], {}, Environment.here(task.model.device))
    for measured in measure(task, prices, watch=watch):
        comparison.rows.append(measured.row)
        job = measured.row.job
        comparison.pictures.setdefault((measured.variant, job.prompt, job.seed), measured.picture)
    return comparison


def price_all(
    task: Task, asked: Sequence[Variant], watch: Watch = lambda _: None
) -> tuple[dict[Variant, list[Variant]], dict[Variant, Price]]:
    """Every method with its baselines, and the prices of the plain run, the methods and the baselines, in this order.

    Raises:
        ValueError: a method does not fit the model or the steps; nothing has run then.
    """
    for variant in asked:
        refuse_what_does_not_fit(task, variant)
    prices: dict[Variant, Price] = {}
    for variant in (PLAIN, *asked):
        watch(f"counting {variant.label}")
        prices[variant] = price(task, variant)
    groups = {variant: baselines(task, variant, prices) for variant in asked if variant != PLAIN}
    for variant in (baseline for found in groups.values() for baseline in found):
        if variant not in prices:
            watch(f"warming up {variant.label}")
            prices[variant] = price(task, variant, counting=False)
    return groups, prices


def refuse_what_does_not_fit(task: Task, variant: Variant) -> None:
    """Plan a variant, to find out now what would go wrong later.

    Raises:
        ValueError: a method does not fit the model, or the number of steps.
    """
    pipe = task.model.pipeline
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(variant.steps(task.steps))
    steps = len(scheduler.timesteps)
    plan(pipe, *variant.methods, steps=steps, guidance=task.guidance > 1, scheduler=scheduler)


def most_runs(task: Task, asked: Sequence[Variant]) -> int:
    """How often `watch` is told at most: each variant may have two baselines."""
    counted = 1 + len(set(asked))
    return 2 * counted + 2 * len(asked) + len(cases(task)) * (counted + 2 * len(asked))
