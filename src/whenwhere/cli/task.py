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
        ValueError: no such model, scheduler or size, a value out of range, or a prompt that names a model.
    """
    from ..bench.order import open_task
    from ..zoo import names

    if misplaced := [prompt for prompt in prompts if prompt in names()]:
        raise ValueError(f"the prompt {misplaced[0]!r} is the name of a model; give models by --model {misplaced[0]}.")
    wanted = options.read_size(size)
    return open_task(prompts, seeds, runs, model, scheduler, steps, guidance, negative, wanted, device, dtype)
