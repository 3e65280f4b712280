"""Tuning: the schedule for a wish, found on some prompts and seeds, and judged on others.

Plans are filtered by multiply-adds, pictures measure quality, and the clock confirms, in turns with the plain run.
Then the choice stands against published defaults at equal cost, fewer steps and guidance stopped, on prompts and seeds
that the search never saw.
"""

from dataclasses import asdict
from pathlib import Path
from statistics import median

from ..anatomy import find, walk
from ..calibration import calibrate
from ..decisions.measuring import Granularity, units
from ..families import FAMILIES
from ..finding import denoiser_of
from .choice import Choice, Rival
from .drawing import draw
from .drift import least_drift, mean_changes
from .environment import Environment
from .forms import Form, forms
from .run import Watch, job_of, measure
from .studio import Studio
from .trial import hold_out, price_quietly
from .tune_search import Candidate, Goal, search
from .variant import PLAIN, Task, Variant

_ROUNDS = 3  # of searching, where the clock does not confirm what multiply-adds promise
_FINALISTS = 3
_CALIBRATION = 4  # prompts


def tune(
    task: Task, held_out: Task, goal: Goal, trials: int, calibration: Path, watch: Watch = lambda _: None
) -> Choice:
    """Find what reaches a goal, and say how it stands.

    Args:
        task: prompts and seeds to tune on.
        held_out: others, of the same model and settings, to judge on.
        goal: what is wanted.
        trials: variants that are drawn at most, in every round.
        calibration: where the measured changes go.
        watch: is told what runs next.

    Raises:
        ValueError: prompts or seeds are not held out, or nothing reaches the goal.
        ImportError: Optuna or torchmetrics is not installed.
    """
    _keep_apart(task, held_out)
    studio = Studio(task)
    watch("measuring changes from step to step")
    known = tuple(open_forms(studio, calibration))
    best, said = _find(studio, known, goal, trials, watch)
    chosen = Variant.of(best.text)
    own, rivals, verdicts = hold_out(held_out, chosen, studio, known, watch)
    setting = job_of(task, PLAIN, "", 0, 0)
    return Choice(
        model=setting.model,
        revision=setting.revision,
        scheduler=setting.scheduler,
        steps=task.steps,
        guidance=task.guidance,
        goal=str(goal),
        expression=chosen.expression,
        calibration=str(calibration) if str(calibration) in chosen.expression else "",
        own=own,
        rivals=rivals,
        said=(*said, *_missed(goal, own), *verdicts),
        environment=asdict(Environment.here(task.model.device)),
    )


def _keep_apart(task: Task, held_out: Task) -> None:
    """No pair of prompt and seed is both tuned on and held out; raises ValueError."""
    tuned, judged = ({(p, s) for p in one.prompts for s in one.seeds} for one in (task, held_out))
    if shared := tuned & judged:
        raise ValueError(f"{len(shared)} pairs of prompt and seed are both tuned on and held out; keep them apart.")


def _missed(goal: Goal, own: Rival) -> list[str]:
    """What has to be said where a choice does not reach on held-out prompts what it was chosen for."""
    if goal.kind == "speedup" and own.speed_up.value < goal.value:
        return [f"On held-out prompts the speed-up is {own.speed_up.value:.2f}, below the {goal.value:g} asked for."]
    if goal.kind == "psnr" and own.psnr.value < goal.value:
        return [f"On held-out prompts PSNR is {own.psnr.value:.1f} dB, below the {goal.value:g} asked for."]
    return []


def open_forms(studio: Studio, calibration: Path) -> list[Form]:
    """What may be tuned on this model, with the changes from step to step measured on the first tuning prompts."""
    task = studio.task
    pipe, denoiser = task.model.pipeline, denoiser_of(task.model.pipeline)
    anatomy = find(denoiser, FAMILIES)
    sites = tuple(walk(denoiser, anatomy))
    rungs = max((site.depth for site in sites if site.depth is not None), default=0)
    blocks = max((site.blocks for site in sites), default=0)

    def generate() -> None:
        for prompt in task.prompts[:_CALIBRATION]:
            draw(pipe, [prompt], [task.seeds[0]], task.steps, task.guidance, task.negative, task.size)

    granularity: Granularity = "layer" if rungs and units(sites, "layer") else "branch"
    measured = calibrate(pipe, generate, granularity, guidance=task.guidance > 1 if anatomy.doubled else None)
    measured.save(calibration)
    changes = mean_changes(measured)
    schedules = {count: least_drift(changes, count) for count in range(1, len(changes) + 1)}
    return forms(len(changes), rungs, blocks, schedules, str(calibration), {site.kind for site in sites})


def _find(
    studio: Studio, known: tuple[Form, ...], goal: Goal, trials: int, watch: Watch
) -> tuple[Candidate, list[str]]:
    """The best that the clock confirms; where it does not, the search goes on for fewer multiply-adds."""
    aim = goal.value if goal.kind != "psnr" else 1.0
    tried: dict[str, tuple[Candidate, float]] = {}
    for _ in range(_ROUNDS):
        found = search(studio, known, goal, aim, trials, watch)[:_FINALISTS]
        tried |= _clock(studio.task, found, watch)
        if goal.kind != "speedup":
            break
        if any(speed >= goal.value for _, speed in tried.values()):
            break
        fastest = max((speed for _, speed in tried.values()), default=1.0)
        aim *= max(1.1, goal.value / fastest)
    if not tried:
        raise ValueError(
            f"nothing reaches {goal}: no method of those that fit comes so far. Ask for less, or allow more --trials."
        )
    return _decide(list(tried.values()), goal)


def _clock(task: Task, found: list[Candidate], watch: Watch) -> dict[str, tuple[Candidate, float]]:
    """The finalists with their speed-up by the clock, run in turns with plain."""
    if not found:
        return {}
    variants = {Variant.of(candidate.text): candidate for candidate in found}
    prices = {variant: price_quietly(task, variant) for variant in (PLAIN, *variants)}
    seconds: dict[Variant, list[float]] = {variant: [] for variant in prices}
    for measured in measure(task, prices, watch=watch):
        seconds[measured.variant].append(measured.row.seconds)
    plain = median(seconds[PLAIN])
    return {candidate.text: (candidate, plain / median(seconds[variant])) for variant, candidate in variants.items()}


def _decide(tried: list[tuple[Candidate, float]], goal: Goal) -> tuple[Candidate, list[str]]:
    """The best of the finalists, and what has to be said of it."""
    if goal.kind == "psnr":
        best, speed = max(tried, key=lambda pair: pair[1])
    else:
        least = goal.value if goal.kind == "speedup" else 1.0
        fast = [pair for pair in tried if pair[1] >= least]
        best, speed = max(fast, key=lambda p: p[0].quality) if fast else max(tried, key=lambda pair: pair[1])
    said = []
    if goal.kind == "speedup" and speed < goal.value:
        said.append(
            f"No finalist reached {goal.value:g} by the clock; the fastest is {speed:.2f} times as fast as plain, "
            f"with {best.ratio:.2f} times fewer multiply-adds."
        )
    elif speed < 1:
        said.append(f"By the clock it is no faster than plain ({speed:.2f}) despite {best.ratio:.2f}x fewer MACs.")
    return best, said
