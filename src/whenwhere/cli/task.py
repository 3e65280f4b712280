"""Tasks from options: what `generate` and `compare` have in common."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import options

if TYPE_CHECKING:
    from ..bench.variant import Task


def make_task(
    prompts: Sequence[str],
    seeds: range,
    runs: int,
    model: str,
    scheduler: str | None,
    steps: int | None,
    guidance: float | None,
    negative: str,
    size: str | None,
    device: str,
    dtype: str,
) -> "Task":
    """Load the model, with another scheduler where one is asked for; what is not given is the model's own.

    Raises:
        ValueError: no such model, scheduler or size, or a value out of range.
    """
    from ..bench.model import open_model
    from ..bench.schedulers import make_scheduler
    from ..bench.variant import Task

    wanted = options.read_size(size)
    opened = open_model(model, device, dtype)
    if scheduler is not None:
        opened.pipeline.scheduler = make_scheduler(scheduler, opened.pipeline.scheduler)
    steps = opened.steps if steps is None else steps
    guidance = opened.guidance if guidance is None else guidance
    return Task(opened, prompts, seeds, runs, steps, guidance, negative, wanted)
