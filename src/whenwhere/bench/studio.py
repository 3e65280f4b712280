"""A studio: plans and draws variants for the tuner, and remembers what it has seen."""

import copy
import warnings
from functools import cached_property
from statistics import median
from typing import Any

from torch import Tensor

from ..metrics import images as metrics
from ..planning import Planner
from .drawing import attached
from .variant import PLAIN, Task, Variant, draw_one

IDENTICAL = 100.0  # dB, of pictures that are the same or nearly so: infinity cannot be compared


class Studio:
    """Everything that tuning asks of a task; nothing is planned or drawn twice.

    Attributes:
        task: tuning prompts and seeds.
        drawn: variants that have been drawn.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self._ratios: dict[str, float | None] = {}
        self._qualities: dict[str, float] = {}

    @property
    def drawn(self) -> int:
        """How many variants have been drawn."""
        return len(self._qualities)

    @cached_property
    def scheduler(self) -> Any:
        """A copy of the pipeline's scheduler, with its timesteps set."""
        found = copy.deepcopy(self.task.model.pipeline.scheduler)
        found.set_timesteps(self.task.steps)
        return found

    @property
    def evaluations(self) -> int:
        """Of the denoiser, in one generation."""
        return len(self.scheduler.timesteps)

    def ratio(self, text: str) -> float | None:
        """How many times fewer multiply-adds an expression plans; `None` where it does not fit."""
        if text not in self._ratios:
            self._ratios[text] = self._plan(text)
        return self._ratios[text]

    def quality(self, text: str) -> float:
        """The median PSNR against the plain pictures, in dB; at most `IDENTICAL`."""
        if text not in self._qualities:
            variant = Variant.of(text)
            self._qualities[text] = median(
                closeness(self._draw(variant, *case), self._plain[case]) for case in self._plain
            )
        return self._qualities[text]

    @cached_property
    def _planner(self) -> Planner:
        return Planner(self.task.model.pipeline, self.evaluations, self.task.guidance > 1, scheduler=self.scheduler)

    def _plan(self, text: str) -> float | None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                cost = self._planner.plan(*Variant.of(text).methods).cost
            except ValueError:
                return None
        return cost.ratio if cost is not None else None

    @cached_property
    def _plain(self) -> dict[tuple[str, int], Tensor]:
        cases = [(prompt, seed) for prompt in self.task.prompts for seed in self.task.seeds]
        return {case: self._draw(PLAIN, *case) for case in cases}

    def _draw(self, variant: Variant, prompt: str, seed: int) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with attached(self.task.model.pipeline, variant.methods, self.task.guidance):
                return draw_one(self.task, variant, prompt, seed)


def closeness(picture: Tensor, reference: Tensor) -> float:
    """PSNR of two pictures (3, H, W), in dB, at most `IDENTICAL`."""
    return min(IDENTICAL, metrics.psnr(picture[None], reference[None])[0])
