"""Orders: all that a process needs to know to run a share of a bench, as plain data that travels between processes."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TypeAlias

import torch
from torch import Tensor

from ..picture import as_image
from ..plan import Plan
from .comparison import price_all, refuse_what_does_not_fit
from .doctor import examine
from .environment import Environment
from .judges import NO_SCORES, Judging
from .model import open_model
from .rowfile import Listing
from .rows import Job, Row
from .run import ALL, Watch, cases, job_of, measure
from .schedulers import make_scheduler
from .variant import PLAIN, Task, Variant


@dataclass(frozen=True)
class Order:
    """What to run; see `Task` and `open_task` for the fields that are not explained here.

    Attributes:
        methods: expressions of the methods to measure; without any, all that fit, with their published defaults.
        judging: the optional scores.
        threads: that PyTorch computes with on the CPU.
        pictures: of how many pairs of prompt and seed the pictures are kept.
    """

    model: str
    methods: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: int = 1
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    negative: str = ""
    size: tuple[int, int] | None = None
    device: str = "auto"
    dtype: str = "auto"
    judging: Judging = NO_SCORES
    threads: int = 1
    pictures: int = 6

    def open(self) -> Task:
        """Load the model, and compute with so many threads from now on.

        Raises:
            ValueError: no such model, scheduler or size, or a value out of range.
        """
        torch.set_num_threads(self.threads)
        return open_task(
            self.prompts,
            self.seeds,
            self.runs,
            self.model,
            self.scheduler,
            self.steps,
            self.guidance,
            self.negative,
            self.size,
            self.device,
            self.dtype,
        )


def open_task(
    prompts: Sequence[str],
    seeds: Sequence[int],
    runs: int,
    model: str,
    scheduler: str | None,
    steps: int | None,
    guidance: float | None,
    negative: str,
    size: tuple[int, int] | None,
    device: str,
    dtype: str,
) -> Task:
    """Load the model, with another scheduler where one is asked for; what is not given is the model's own.

    Raises:
        ValueError: no such model or scheduler, or a value out of range.
    """
    opened = open_model(model, device, dtype)
    if scheduler is not None:
        opened.pipeline.scheduler = make_scheduler(scheduler, opened.pipeline.scheduler)
    steps = opened.steps if steps is None else steps
    guidance = opened.guidance if guidance is None else guidance
    return Task(opened, prompts, seeds, runs, steps, guidance, negative, size)


@dataclass(frozen=True)
class Begun:
    """Everything fits: where it is measured, what all rows have in common, and how many cases are ahead."""

    environment: Environment
    setting: Job
    cases: int


@dataclass(frozen=True)
class Listed:
    """A variant with its baselines and its plan."""

    listing: Listing
    plan: Plan


@dataclass(frozen=True)
class Done:
    """A row, with its picture as PNG where that is kept."""

    row: Row
    picture: bytes | None


Event: TypeAlias = Begun | Listed | Done


class Merged:
    """Which events of several processes go on: all rows; of what they all tell alike, what is told first.

    So nothing is done before it was begun and listed, whoever is faster.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()

    def passes(self, event: Event) -> bool:
        """Whether this one goes on."""
        if isinstance(event, Done):
            return True
        name = event.listing.key if isinstance(event, Listed) else ""
        new = name not in self._told
        self._told.add(name)
        return new


def carry_out(
    order: Order, finished: Collection[Job] = (), share: slice = ALL, watch: Watch = lambda _: None
) -> Iterator[Event]:
    """Run the cases of an order, or a share of them, and tell what happens.

    Raises:
        ValueError: something does not fit the model; this comes before the first event.
        ImportError: a score was asked for whose packages are missing; also before.
    """
    task = order.open()
    asked = list(dict.fromkeys(Variant.of(text) for text in order.methods or usual(task)))
    for variant in asked:
        refuse_what_does_not_fit(task, variant)
    judges = order.judging.open()
    all_cases = cases(task)
    yield Begun(Environment.here(task.model.device), job_of(task, PLAIN, "", 0, 0).setting, len(all_cases))
    groups, prices = price_all(task, asked, watch)
    for variant, price in prices.items():
        baselines = tuple(baseline.expression for baseline in groups.get(variant, ()))
        yield Listed(Listing(variant.expression, variant.label, baselines), price.plan)
    kept = set(all_cases[: order.pictures])
    for measured in measure(task, prices, finished, watch, judges, share):
        job = measured.row.job
        yield Done(measured.row, _as_png(measured.picture) if (job.prompt, job.seed, job.run) in kept else None)


def usual(task: Task) -> list[str]:
    """Expressions of all methods that fit a model and save something, with their published defaults."""
    found = examine(task.model.pipeline, task.steps, task.guidance).treatments
    return [treatment.label for treatment in found if treatment.ratio is not None and treatment.ratio > 1]


def _as_png(picture: Tensor) -> bytes:
    """A picture (3, H, W) as the content of a file."""
    stream = BytesIO()
    as_image(picture).save(stream, "PNG")
    return stream.getvalue()
