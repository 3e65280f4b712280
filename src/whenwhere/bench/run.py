"""Running: plain and methods take turns on every prompt and seed, so that a machine's moods strike all alike."""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..metrics import images as metrics
from ..pricing.cost import Macs
from .drawing import attached
from .judges import NOBODY, Judges
from .price import Price
from .rows import Job, Row
from .stopwatch import Stopwatch
from .variant import PLAIN, Task, Variant, draw_one

Watch = Callable[[str], None]  # told what is run next
ALL = slice(None)


@dataclass(frozen=True)
class Measured:
    """A row, with the variant it belongs to and the picture (3, H, W) that was drawn."""

    row: Row
    variant: Variant
    picture: Tensor


def measure(
    task: Task,
    prices: Mapping[Variant, Price],
    finished: Collection[Job] = (),
    watch: Watch = lambda _: None,
    judges: Judges = NOBODY,
    share: slice = ALL,
) -> Iterator[Measured]:
    """Run every variant on every prompt and seed, in turns: plain, A, B, plain, A, B, ...

    Every variant has run once before, unmeasured, so that no first-run cost is counted. Where its multiply-adds were
    counted, which replaces some kernels, it runs here once more without.

    Args:
        task: what is drawn.
        prices: the variants, with their prices; the plain one is among them and comes first.
        finished: jobs to skip.
        watch: is told before every run.
        judges: give the optional scores.
        share: which of the cases are run here, for example every second one.
    """
    variants = sorted(prices, key=lambda variant: variant != PLAIN)
    finished = set(finished)
    mine = cases(task)[share]
    waiting = {job.method for case in mine for job in (job_of(task, v, *case) for v in variants) if job not in finished}
    for variant in variants:
        if variant.expression in waiting and prices[variant].counted:
            watch(f"warming up {variant.label}")
            _run(task, variant, task.prompts[0], task.seeds[0])
    for case in mine:
        reference: Tensor | None = None
        for variant in variants:
            job = job_of(task, variant, *case)
            if job in finished:
                continue
            if variant != PLAIN and reference is None:  # its row is finished, its picture is gone
                reference = _run(task, PLAIN, job.prompt, job.seed)[0]
            watch(f"{variant.label}, seed {job.seed}")
            picture, stopwatch, found = _run(task, variant, job.prompt, job.seed)
            row = _row(job, prices[variant], found or prices[variant].planned, stopwatch, picture, reference, judges)
            reference = picture if reference is None else reference
            yield Measured(row, variant, picture)


def cases(task: Task) -> list[tuple[str, int, int]]:
    """Prompt, seed and number of the repetition, in the order of running."""
    return [(prompt, seed, run) for run in range(task.runs) for prompt in task.prompts for seed in task.seeds]


def job_of(task: Task, variant: Variant, prompt: str, seed: int, run: int) -> Job:
    """What a row of this run is a measurement of."""
    height, width = task.size or (0, 0)
    return Job(
        model=task.model.name,
        revision=task.model.revision,
        dtype=task.model.dtype,
        scheduler=type(task.model.pipeline.scheduler).__name__,
        method=variant.expression,
        prompt=prompt,
        negative=task.negative,
        seed=seed,
        steps=task.steps,
        guidance=task.guidance,
        height=height,
        width=width,
        run=run,
    )


def _run(task: Task, variant: Variant, prompt: str, seed: int) -> tuple[Tensor, Stopwatch, Macs | None]:
    """One picture (3, H, W), timed, with the multiply-adds of what methods decided while it was drawn, if they did.

    What a method has to say about its settings was said when it was priced.
    """
    pipe = task.model.pipeline
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with (
            attached(pipe, variant.methods, task.guidance) as attachment,
            Stopwatch(pipe, task.model.device) as stopwatch,
        ):
            picture = draw_one(task, variant, prompt, seed)
    deciding = attachment is not None and any(method.adaptive for method in variant.methods)
    return picture, stopwatch, attachment.trace.priced.macs if attachment is not None and deciding else None


def _row(
    job: Job, price: Price, macs: Macs, watch: Stopwatch, picture: Tensor, reference: Tensor | None, judges: Judges
) -> Row:
    return Row(
        job=job,
        seconds=watch.seconds,
        denoising=watch.denoising,
        evaluations=watch.evaluations,
        macs=macs.all,
        macs_papers=macs.papers,
        counted=price.counted.all if price.counted else None,
        counted_papers=price.counted.papers if price.counted else None,
        bytes=price.planned_bytes,
        held=price.held_bytes,
        peak_memory=watch.peak_memory,
        resident=watch.resident,
        psnr=metrics.psnr(picture[None], reference[None])[0] if reference is not None else None,
        ssim=metrics.ssim(picture[None], reference[None])[0] if reference is not None else None,
        **judges(picture, reference, job.prompt),
    )
