"""The course of generations on one pipeline: how one begins, goes from step to step, and ends.

A generation begins with the first call of the denoiser after the scheduler laid out its steps, and ends with the last
of these, or with an error.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import Anatomy, Role
from .clock import Clock, Scheduler
from .decision import Output, map_tensors
from .generation import Generation
from .layout import argument_reader, declared_roles
from .method import Method, Setting
from .pricing.cost import price_or_reason
from .pricing.unit import Unit
from .schedule import executed, handover
from .setting import setting_of
from .site import Kind, Site
from .table import idle
from .turns import Turns


class Course:
    """Carries one generation at a time.

    Attributes:
        present: the generation that is running.
        latest: that one, or the one before.
    """

    def __init__(
        self,
        pipe: Any,
        scheduler: Scheduler,
        anatomy: Anatomy,
        methods: Sequence[Method],
        modules: Mapping[Site, nn.Module | None],
        successors: Mapping[Site, nn.Module | None],
        guidance: bool | None,
        unexpected: Callable[[], None],
    ) -> None:
        """Listen to the scheduler.

        Args:
            pipe: the pipeline, or a bare denoiser.
            scheduler: its own, or that of the loop.
            anatomy: of the denoiser.
            methods: fitted, the outermost first.
            modules: of all sites that they ask about.
            successors: those of a second denoiser; empty where there is one.
            guidance: whether there are guidance branches, where nobody else tells.
            unexpected: is told where the scheduler moves though the denoiser was not called.
        """
        self._pipe, self._scheduler, self._anatomy, self._guidance = pipe, scheduler, anatomy, guidance
        self._methods, self._modules, self._sites, self._unexpected = methods, modules, tuple(modules), unexpected
        self._successors = successors
        self.present: Generation | None = None
        self.latest: Generation | None = None
        self._examples: dict[Kind, dict[str, Any]] = {}
        self._units: list[Unit] | str = []  # what these examples cost; empty until somebody asks
        self._warned = False
        self._laid_out = False  # since the last call of the denoiser
        self._turns = Turns(scheduler)
        self._unsettled: Setting | None = None  # of the present generation, until its branches are known
        self._clock = Clock(scheduler, self._begin_anew, self._stepped, self._move)

    def units(self) -> list[Unit] | str:
        """What the sites cost, for one row of what the denoiser was called with; or why nobody knows."""
        self._units = self._units or price_or_reason(self._modules, self._examples)
        return self._units

    def stop(self) -> None:
        """Drop what is running, and listen no more."""
        self.abandon()
        self._clock.stop()

    def evaluate(self, i: int, site: Site, original: Callable[..., Output], named: dict[str, Any]) -> Output:
        """One call of the denoiser, or of a network beside it."""
        try:
            self._laid_out = False
            generation = self.present or self._begin(named)
            if site.kind not in self._examples or not generation.trace:
                self._examples[site.kind] = map_tensors(named, _on_meta)
                self._units = []
            if site.kind is Kind.MODEL:
                self._turns.call(named.get("timestep"))
            rows = next(iter(named.values())).shape[0]
            generation.open(self._clock.index, rows if site.kind is Kind.MODEL else None)
            generation.traced.reached[i] = True
            opinions = generation.column.opinions[i]
            output = generation.carry_out(i, opinions, original, (), named) if opinions else original(**named)
        except BaseException:
            self.abandon()
            raise
        if site.kind is Kind.MODEL:
            generation.close()
        return output

    def _begin(self, named: dict[str, Any]) -> Generation:
        """The first call of a generation: learn how many steps and branches there are."""
        used = getattr(self._pipe, "scheduler", self._scheduler)
        if used is not self._scheduler:
            raise RuntimeError(
                f"the scheduler was replaced after attaching: {type(self._scheduler).__name__} is listened to, "
                f"{type(used).__name__} is in use. Detach, and attach again with the new one."
            )
        declared = declared_roles(self._pipe, self._anatomy)
        if self._guidance is not None:
            declared = self._anatomy.roles if self._guidance else (Role.CONDITIONAL,)
        self._clock.index = 0
        self._turns.begin(self._scheduler.timesteps)
        told = any(method.reads_timestep for method in self._methods)
        timesteps, sigmas, skipped = executed(self._pipe, self._scheduler, named.get("timestep"), told)
        modules, successors = list(self._modules.values()), list(self._successors.values())
        taken_over, sample = handover(self._pipe, self._scheduler) if successors else None, next(iter(named.values()))
        setting = setting_of(self._pipe, self._scheduler, sample, timesteps, skipped, declared, taken_over)
        self._unsettled = setting if declared is None and not self._anatomy.doubled else None
        for method in self._methods:
            method.review(setting)
        self.present = self.latest = Generation(
            self._sites, self._methods, self._anatomy, timesteps, declared, modules, sigmas, successors, taken_over
        )
        return self.present

    def _stepped(self, samples: int, timestep: object) -> None:
        """The scheduler is about to move."""
        generation = self.present
        if generation is None:
            if self._laid_out:
                self._unexpected()
            return
        try:
            self._turns.step(timestep)
        except RuntimeError:
            self.abandon()
            raise
        generation.stepped(samples)
        self._settle(generation)
        if self._sites[-1].kind is Kind.SCHEDULER:
            generation.traced.reached[-1] = True

    def _settle(self, generation: Generation) -> None:
        """Tell the methods how many branches there are, where that is known only now."""
        if self._unsettled is None or generation.branches is None:
            return
        setting, self._unsettled = replace(self._unsettled, branches=len(generation.branches.roles)), None
        try:
            for method in self._methods:
                method.settle(setting)
        except ValueError:
            self.abandon()
            raise

    def _move(self, original: Callable[..., Output], *args: Any, **kwargs: Any) -> Output:
        """The scheduler moves the latents; after the last step, or an error, the generation is over."""
        generation = self.present
        if generation is None:
            return original(*args, **kwargs)
        try:
            opinions = generation.column.opinions[-1] if self._sites[-1].kind is Kind.SCHEDULER else ()
            if opinions:
                args, kwargs = (), argument_reader(type(self._scheduler).step)(args, kwargs)
                moved = generation.carry_out(len(self._sites) - 1, opinions, original, args, kwargs)
            else:
                moved = original(*args, **kwargs)
        except BaseException:
            self.abandon()
            raise
        if self._clock.index + 1 >= generation.count:
            self.abandon()
            self._warn_of_the_idle(generation)
        return moved

    def _begin_anew(self) -> None:
        """The scheduler laid out its steps: a generation will begin with the first call of the denoiser."""
        self._turns.laid_out(broken=self.present is not None)
        self.abandon()
        if isinstance(getattr(self._pipe, "_num_timesteps", None), int):
            self._pipe._num_timesteps = None  # of an earlier call; pipelines set it anew, one's own loops do not
        self._laid_out = True

    def abandon(self) -> None:
        """Drop the memory of the generation that is running, if there is one."""
        if self.present is not None:
            self.present.memory.clear()
        self.present = None

    def _warn_of_the_idle(self, generation: Generation) -> None:
        """Say so, once, if a method changed nothing in a whole generation."""
        if self._warned:
            return
        for number, method in enumerate(self._methods):
            if idle(generation.trace, number):
                self._warned = True
                warnings.warn(
                    f"{method} changed nothing in {generation.count} steps: {method.idle_reason}", stacklevel=7
                )


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")
