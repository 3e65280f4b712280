"""Seconds and memory of one generation, synchronised with the device."""

import time
from types import TracebackType
from typing import Any, Self

import torch

from ..clock import Clock
from . import resident


class Stopwatch:
    """Measures what happens inside a `with`; listens to the pipeline's scheduler to tell denoising from the rest.

    Attributes:
        seconds: all of it.
        denoising: from the layout of the timesteps to the last update of the sample.
        evaluations: updates of the sample, each with one step's evaluations of the denoiser before it.
        peak_memory: the most bytes allocated on the accelerator; `None` on the CPU.
        resident: by how many bytes the process grew at most; `None` where the system does not tell.
    """

    def __init__(self, pipe: Any, device: torch.device) -> None:
        self.seconds = self.denoising = 0.0
        self.evaluations = 0
        self.peak_memory: int | None = None
        self.resident: int | None = None
        self._pipe, self._cuda = pipe, device if device.type == "cuda" else None
        self._laid: float | torch.cuda.Event = 0.0
        self._last: float | torch.cuda.Event = 0.0

    def __enter__(self) -> Self:
        if self._cuda:
            torch.cuda.synchronize(self._cuda)
            torch.cuda.reset_peak_memory_stats(self._cuda)
        self._resident = resident.begin()
        self._clock = Clock(self._pipe.scheduler, self._begin, self._stepped)
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._cuda)
            self.peak_memory = torch.cuda.max_memory_allocated(self._cuda)
        self.seconds = time.perf_counter() - self._start
        self.resident = resident.grown(self._resident)
        self._clock.stop()
        if isinstance(self._laid, torch.cuda.Event) and isinstance(self._last, torch.cuda.Event):
            self.denoising = self._laid.elapsed_time(self._last) / 1000
        elif isinstance(self._laid, float) and isinstance(self._last, float):
            self.denoising = self._last - self._laid

    def _begin(self) -> None:
        self._laid = self._last = self._moment()

    def _stepped(self, _samples: int, _timestep: object) -> None:
        self.evaluations += 1
        self._last = self._moment()

    def _moment(self) -> float | torch.cuda.Event:
        """Now: by the clock on the wall, or as a mark in the accelerator's own stream, which costs no waiting."""
        if self._cuda is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._cuda))
        return event
