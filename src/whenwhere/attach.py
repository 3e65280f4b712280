"""Attaching methods to a pipeline: the only file that touches a forward.

`attach` replaces, on the instances, the `forward` of every module that a method has asked about, and lets the clock
listen to the scheduler. A wrapped call looks its decisions up in the column of the present step; with none it goes
straight on.
`detach` takes everything off again.
"""

import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from .anatomy import Anatomy, Role, find
from .clock import Clock, Scheduler, Step
from .decision import Output, map_tensors
from .families import FAMILIES
from .finding import denoiser_of, modules_of, refuse_the_attached
from .front import Front
from .generation import Generation
from .layout import argument_reader, declared_roles
from .method import Method, Setting
from .plan import Plan
from .pricing.cost import price
from .pricing.unit import Unit
from .schedule import executed
from .site import Kind, Site
from .table import Column


def attach(
    pipe: Any,
    *methods: Method,
    scheduler: Scheduler | None = None,
    anatomy: Anatomy | None = None,
    guidance: bool | None = None,
) -> "Attachment":
    """Attach methods to a pipeline, or to a bare denoiser with the scheduler of your own loop.

    Args:
        pipe: a diffusers pipeline, or its denoiser (a module) together with `scheduler`.
        methods: the outermost first: where two methods have an opinion about one site, the first one's decision
            encloses the second's.
        scheduler: the scheduler of your loop; for a pipeline, its own is taken.
        anatomy: for a model family that the library does not know.
        guidance: whether the denoiser's batch holds guidance branches, in the family's order. Only needed where
            neither the pipeline nor its scheduler's steps tell: `DiTPipeline`, and loops that move all branches
            together.

    Returns:
        An `Attachment`: a context manager that detaches when it is left, or an object with `detach()`.

    Raises:
        ValueError: no method, a model of no known family, a method that does not fit the model, something attached
            already.
        TypeError: what is attached is not a method, or there is no denoiser or scheduler to attach to.
    """
    if not methods:
        raise ValueError("attach needs at least one method, for example attach(pipe, TGate(gate_step=10)).")
    for method in methods:
        if not isinstance(method, Method):
            raise TypeError(f"{method!r} is not a method; methods are objects such as TGate(gate_step=10).")
    denoiser = denoiser_of(pipe)
    scheduler = getattr(pipe, "scheduler", None) if scheduler is None else scheduler
    if scheduler is None or not all(hasattr(scheduler, name) for name in ("set_timesteps", "step", "timesteps")):
        raise TypeError(
            f"{type(pipe).__name__} comes with {scheduler!r} as its scheduler, so nobody tells which step it is: "
            "attach(denoiser, ..., scheduler=...)."
        )
    return Attachment(pipe, denoiser, scheduler, anatomy or find(denoiser, FAMILIES), methods, guidance)


class Attachment:
    """Methods on one pipeline. Made by `attach`; carries one generation at a time."""

    def __init__(
        self,
        pipe: Any,
        denoiser: nn.Module,
        scheduler: Scheduler,
        anatomy: Anatomy,
        methods: Sequence[Method],
        guidance: bool | None,
    ) -> None:
        fitted = [method.fit(denoiser, pipe) for method in methods]
        self.methods = tuple(sorted(fitted, key=lambda method: method.innermost))
        self.anatomy = anatomy
        self._pipe, self._denoiser, self._scheduler, self._guidance = pipe, denoiser, scheduler, guidance
        self._modules = modules_of(pipe, anatomy, self.methods)
        refuse_the_attached(denoiser, self._modules)
        self.sites = tuple(self._modules)
        self._examples: dict[Kind, dict[str, Any]] = {}
        self._units: list[Unit] = []  # what these examples cost; empty until somebody asks
        self._generation: Generation | None = None  # the one that is running
        self._latest: Generation | None = None  # that one, or the one before
        self._warned = False
        self._laid_out = False  # since the last call of the denoiser
        self._clock = Clock(scheduler, self._begin_anew, self._stepped, self._move)
        sites = [(i, site, module) for i, (site, module) in enumerate(self._modules.items()) if module is not None]
        # What methods install stands between the denoiser's front and those inside, so that these see what is run.
        inside = [self._put_front(*place) for place in sites if place[2] is not denoiser]
        self._fronts, self._installed = inside, []
        try:
            for method in self.methods:
                self._installed.append(method.install(denoiser, self._present))
        except ValueError:
            self.detach()
            raise
        self._fronts = [*inside, *(self._put_front(*place) for place in sites if place[2] is denoiser)]

    def _present(self) -> Step:
        """The step that is running."""
        if self._generation is None:
            raise RuntimeError("no generation is running, so there is no present step.")
        return self._generation.column.step

    # -- what was planned and done -----------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan of the generation that is running or ran last.

        Raises:
            RuntimeError: nothing ran yet, so the number of steps is not known; `whenwhere.plan(pipe, ..., steps=N)`
                needs no run.
        """
        generation = self._generated("plan")
        return self._table("plan", generation, generation.plan)

    @property
    def trace(self) -> Plan:
        """What was really done in the generation that is running or ran last.

        Raises:
            RuntimeError: nothing ran yet.
        """
        generation = self._generated("trace")
        return self._table("trace", generation, generation.trace)

    def notes(self, method: int = 0) -> dict[str, Any]:
        """What a method, by its number, wrote down in the generation that is running or ran last.

        Raises:
            RuntimeError: nothing ran yet.
        """
        return self._generated("notes").notes[method]

    def _generated(self, what: str) -> Generation:
        if self._latest is None:
            raise RuntimeError(
                f"no {what} yet: nothing was generated since attaching. whenwhere.plan(pipe, *methods, steps=N) tells "
                "beforehand."
            )
        return self._latest

    def _table(self, what: Literal["plan", "trace"], generation: Generation, columns: list[Column]) -> Plan:
        samples = generation.samples or (generation.branches.samples if generation.branches else 1)
        held = generation.memory.peak if what == "trace" else None
        self._units = self._units or price(self._modules, self._examples)
        model = type(self._denoiser).__name__
        notes = generation.notes if what == "trace" else ()
        return Plan.of(what, model, self.methods, self.sites, columns, self._units, samples, held, notes)

    # -- a generation ------------------------------------------------------------------------------------------------

    def _put_front(self, i: int, site: Site, module: nn.Module) -> Front:
        """Put our forward in front of a module's."""
        named = argument_reader(type(module).forward)

        def whole(original: Callable[..., Output]) -> Callable[..., Output]:
            return lambda *args, **kwargs: self._evaluate(i, site, original, named(args, kwargs))

        def inner(original: Callable[..., Output]) -> Callable[..., Output]:
            def forward(*args: Any, **kwargs: Any) -> Output:
                generation = self._generation
                if generation is None or generation.unattended:
                    return original(*args, **kwargs)
                generation.traced.reached[i] = True
                opinions = generation.column.opinions[i]
                if not opinions:
                    return original(*args, **kwargs)
                return generation.carry_out(i, opinions, original, args, kwargs)

            return forward

        return Front(module, "forward", whole if site.kind in (Kind.MODEL, Kind.CONTROL) else inner)

    def _evaluate(self, i: int, site: Site, original: Callable[..., Output], named: dict[str, Any]) -> Output:
        """One call of the denoiser, or of a network beside it."""
        try:
            self._laid_out = False
            generation = self._generation or self._begin(named)
            if site.kind not in self._examples or not generation.trace:
                self._examples[site.kind] = map_tensors(named, _on_meta)
                self._units = []
            rows = next(iter(named.values())).shape[0]
            generation.open(self._clock.index, rows if site.kind is Kind.MODEL else None)
            generation.traced.reached[i] = True
            opinions = generation.column.opinions[i]
            output = generation.carry_out(i, opinions, original, (), named) if opinions else original(**named)
        except BaseException:
            self._abandon()
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
        declared = declared_roles(self._pipe, self.anatomy)
        if self._guidance is not None:
            declared = self.anatomy.roles if self._guidance else (Role.CONDITIONAL,)
        self._clock.index = 0
        told = any(method.reads_timestep for method in self.methods)
        timesteps, sigmas = executed(self._pipe, self._scheduler, named.get("timestep"), told)
        scale, size = getattr(self._pipe, "guidance_scale", None), tuple(next(iter(named.values())).shape[1:])
        skipped = len(self._scheduler.timesteps) - len(timesteps)
        for method in self.methods:
            method.review(Setting(len(timesteps), type(self._scheduler).__name__, scale, size, skipped))
        modules = list(self._modules.values())
        self._generation = self._latest = Generation(
            self.sites, self.methods, self.anatomy, timesteps, declared, modules, sigmas
        )
        return self._generation

    def _stepped(self, samples: int) -> None:
        """The scheduler is about to move."""
        generation = self._generation
        if generation is None:
            return self._expect_the_denoiser()
        generation.stepped(samples)
        if self.sites[-1].kind is Kind.SCHEDULER:
            generation.traced.reached[-1] = True
        return None

    def _move(self, original: Callable[..., Output], *args: Any, **kwargs: Any) -> Output:
        """The scheduler moves the latents; after the last step, or an error, the generation is over."""
        generation = self._generation
        if generation is None:
            return original(*args, **kwargs)
        try:
            opinions = generation.column.opinions[-1] if self.sites[-1].kind is Kind.SCHEDULER else ()
            if opinions:
                args, kwargs = (), argument_reader(type(self._scheduler).step)(args, kwargs)
                moved = generation.carry_out(len(self.sites) - 1, opinions, original, args, kwargs)
            else:
                moved = original(*args, **kwargs)
        except BaseException:
            self._abandon()
            raise
        if self._clock.index + 1 >= generation.count:
            self._abandon()
            self._warn_of_the_idle(generation)
        return moved

    def _begin_anew(self) -> None:
        """The scheduler laid out its steps: a generation will begin with the first call of the denoiser."""
        self._abandon()
        self._laid_out = True

    def _expect_the_denoiser(self) -> None:
        """The scheduler moves though the denoiser was not called: fine if another one was, but not if ours is lost."""
        if self._laid_out and not self._fronts[-1].reached:
            raise RuntimeError(
                f"the forward of {type(self._denoiser).__name__} was put back after attaching, so no method is carried "
                "out. Offloading does this after every run: attach before you turn it on."
            )

    def _abandon(self) -> None:
        """Drop the memory of the generation that is running, if there is one."""
        if self._generation is not None:
            self._generation.memory.clear()
        self._generation = None

    def _warn_of_the_idle(self, generation: Generation) -> None:
        """Say so, once, if a method changed nothing in a whole generation."""
        if self._warned:
            return
        for number, method in enumerate(self.methods):
            opinions = (
                o for column in generation.trace for cell in column.opinions for o in cell if o.method == number
            )
            if all(opinion.decision.neutral for opinion in opinions):
                self._warned = True
                warnings.warn(
                    f"{method} changed nothing in {generation.count} steps: {method.idle_reason}", stacklevel=7
                )

    # -- the end -----------------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Give modules and scheduler back as they were found; calling it again does nothing."""
        self._abandon()
        self._clock.stop()
        while self._fronts and self._fronts[-1].owner is self._denoiser:
            self._fronts.pop().remove()
        while self._installed:
            self._installed.pop()()
        while self._fronts:
            self._fronts.pop().remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")
