"""What a pipeline executes of the steps that its scheduler laid out, with their noise levels."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .clock import Scheduler
from .turns import place


def executed(
    pipe: object, scheduler: Scheduler, given: object, told: bool
) -> tuple[list[float | None], list[float | None], int]:
    """Timesteps and noise levels of a generation, and how many were laid out before the first of them.

    Image-to-image runs the tail of what the scheduler laid out; an ensemble of two denoisers parts it.

    Args:
        pipe: the pipeline, which may know how many steps it runs.
        scheduler: its own, with timesteps set.
        given: the first timestep, as the denoiser was told.
        told: whether timesteps are asked for, which synchronises the device; else every one is `None`.

    Raises:
        RuntimeError: the scheduler has no timesteps.
    """
    laid = len(scheduler.timesteps)
    if laid == 0:
        raise RuntimeError("the scheduler has no timesteps: call its set_timesteps before the denoiser.")
    known, lies = getattr(pipe, "_num_timesteps", None), place(scheduler.timesteps, given)
    count = known if isinstance(known, int) and 0 < known <= laid else laid - (lies or 0)
    first = laid - count if lies is None or lies + count > laid else lies
    if getattr(scheduler, "begin_index", None) == 0:
        first = 0  # the pipeline says so; what is left at the end is no step (Sana-Sprint)
    if not told:
        return [None] * count, [], first
    timesteps: list[float | None] = [float(t) for t in scheduler.timesteps]
    if isinstance(given, Tensor) and timesteps[0] == float(given.flatten()[0]) != timesteps[first]:
        first = 0  # the head of the schedule: an ensemble hands the rest over to a refiner
    sigmas = noise_levels(scheduler, timesteps)
    return timesteps[first : first + count], sigmas[first : first + count], first


def handover(pipe: object, scheduler: Scheduler) -> int | None:
    """The step at which a pipeline's second denoiser takes over: the first below its boundary, a share of the range.

    Args:
        pipe: the pipeline; one without a boundary leaves everything to its first denoiser.
        scheduler: its own, with timesteps set.
    """
    share = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
    if share is None:
        return None
    config: Any = getattr(scheduler, "config", None)
    return int((scheduler.timesteps >= share * config.num_train_timesteps).sum())


def noise_levels(scheduler: Any, timesteps: Sequence[float | None]) -> list[float | None]:
    """The noise level at every timestep of a scheduler; `None` where it does not tell.

    Args:
        scheduler: its `sigmas`, or else its `alphas_cumprod`, are read.
        timesteps: all that it laid out.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) >= len(timesteps):
        return [float(sigma) for sigma in sigmas[: len(timesteps)]]
    signal = getattr(scheduler, "alphas_cumprod", None)
    if signal is None or None in timesteps:
        return [None] * len(timesteps)
    shares = [float(signal[round(t)]) for t in timesteps if t is not None]
    return [math.sqrt((1 - share) / share) for share in shares]
