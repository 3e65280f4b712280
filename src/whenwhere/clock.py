"""The clock: which step of a generation it is, told by the scheduler's own calls.

Pipelines call `scheduler.set_timesteps` once before their loop and `scheduler.step` once per evaluation of the
denoiser, whatever the order of the solver. Counting these calls needs no callback and no device synchronisation,
unlike reading the timestep tensor. A denoiser called twice before one `scheduler.step` (separate guidance calls) is in
its second pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .front import Front


class Scheduler(Protocol):
    """The part of a diffusers scheduler that the clock listens to."""

    timesteps: torch.Tensor

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Lay out the steps of the next generation."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Move the sample by one evaluation of the denoiser."""


@dataclass(frozen=True, slots=True)
class Step:
    """One evaluation of the denoiser.

    Attributes:
        index: its number in the executed schedule, from 0. Solvers of second order have several evaluations per
            interval; each is a step of its own.
        count: how many evaluations this generation executes (image-to-image executes fewer than were asked for).
        pass_: 0, or 1 for the second of two separate guidance calls.
        branches: guidance branches in the batch of this call; 1 without guidance or with separate calls.
        timestep: the scheduler's value for it, where the plan was laid from a scheduler; `None` otherwise.
        previous: the timestep of the step before; `None` in the first one and where timesteps are not known.
        timesteps: those of all steps.
        sigmas: the noise levels of all steps, where timesteps are known; `None` where the scheduler does not tell.
    """

    index: int
    count: int
    pass_: int = 0
    branches: int = 1
    timestep: float | None = None
    previous: float | None = None
    timesteps: tuple[float | None, ...] = ()
    sigmas: tuple[float | None, ...] = ()

    @property
    def last(self) -> bool:
        """Whether no evaluation follows."""
        return self.index == self.count - 1


def lay_out(
    timesteps: Sequence[float | None], branches: int, passes: int, sigmas: Sequence[float | None] = ()
) -> list[Step]:
    """All steps of a generation in the order of evaluation, from its timesteps (`None` where they are not known)."""
    count, laid, levels = len(timesteps), tuple(timesteps), tuple(sigmas)
    return [
        Step(i, count, pass_, branches, timestep, previous, laid, levels)
        for i, (timestep, previous) in enumerate(zip(timesteps, [None, *timesteps], strict=False))
        for pass_ in range(passes)
    ]


class Clock:
    """Counts the steps of one scheduler by listening to it; restores it exactly when it stops."""

    def __init__(
        self,
        scheduler: Scheduler,
        begin: Callable[[], None],
        stepped: Callable[[int, object], None],
        move: Callable[..., Any] | None = None,
    ) -> None:
        """Listen to a scheduler.

        Args:
            scheduler: any object with `set_timesteps`, `step` and `timesteps`.
            begin: called when a new generation is laid out.
            stepped: called before every `scheduler.step`, with the number of rows of the sample it moves and the
                timestep it is given.
            move: called in place of `scheduler.step`, with that function and the arguments of the call.
        """
        self.scheduler = scheduler
        self.index = 0
        self._begin = begin
        self._stepped = stepped
        self._move = move or (lambda original, *args, **kwargs: original(*args, **kwargs))
        # Pipelines inspect the signatures of both; a front keeps them visible.
        self._fronts = [
            Front(scheduler, "set_timesteps", self._listen_to_layout),
            Front(scheduler, "step", self._listen_to_step),
        ]

    def _listen_to_layout(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.index = 0
            self._begin()
            return result

        return set_timesteps

    def _listen_to_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            sample = kwargs["sample"] if "sample" in kwargs else args[2]
            self._stepped(sample.shape[0], kwargs["timestep"] if "timestep" in kwargs else args[1])
            result = self._move(original, *args, **kwargs)
            self.index += 1
            return result

        return step

    def stop(self) -> None:
        """Give the scheduler back as it was found."""
        while self._fronts:
            self._fronts.pop().remove()
