"""Attaching methods to a pipeline: the only file that touches a forward.

`attach` replaces, on the instances, the `forward` of every module that a method has asked about. A wrapped call looks
its decisions up in the column of the present step; with none it goes straight on. `detach` takes everything off again.
"""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, Self

from torch import nn

from .anatomy import Anatomy, find
from .clock import Scheduler, Step
from .course import Course
from .decision import Output
from .families import FAMILIES
from .finding import (
    counterparts,
    denoiser_of,
    denoisers_of,
    front_of,
    modules_of,
    refuse_strangers,
    refuse_the_attached,
)
from .front import Front
from .generation import Generation
from .layout import argument_reader
from .method import Method
from .plan import Plan
from .ranges import true_or_false
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
    refuse_strangers(methods)
    if guidance is not None:
        true_or_false("guidance", guidance)
    denoiser = denoiser_of(pipe)
    scheduler = getattr(pipe, "scheduler", None) if scheduler is None else scheduler
    if scheduler is None or not all(hasattr(scheduler, name) for name in ("set_timesteps", "step", "timesteps")):
        raise TypeError(
            f"{type(pipe).__name__} comes with {scheduler!r} as its scheduler, so nobody tells which step it is: "
            "attach(denoiser, ..., scheduler=...)."
        )
    return Attachment(pipe, denoiser, scheduler, anatomy or find(denoiser, FAMILIES), methods, guidance)


def detach(pipe: Any) -> None:
    """Take off what is attached to a pipeline or a denoiser, where nobody kept what `attach` returned.

    Raises:
        ValueError: nothing is attached to it.
        TypeError: there is no denoiser.
    """
    denoiser = denoiser_of(pipe)
    for module in denoiser.modules():
        if (front := front_of(module)) is not None:
            front.holder.detach()
            return
    raise ValueError(f"nothing is attached to {type(denoiser).__name__}.")


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
        self._denoiser, *second = self._denoisers = denoisers_of(pipe)
        modules = modules_of(pipe, anatomy, self.methods)
        successors = counterparts(modules, second[0]) if second else {}
        refuse_the_attached(denoiser, modules)
        refuse_the_attached(denoiser, successors)
        for method in self.methods:
            if second and method.observes:
                raise ValueError(f"{method} goes on one denoiser, and {type(pipe).__name__} has two; FORA serves both.")
        self.sites = tuple(modules)
        self._course = Course(
            pipe, scheduler, anatomy, self.methods, modules, successors, guidance, self._miss_the_denoiser
        )
        places = [
            *enumerate(modules.items()),
            *(place for place in enumerate(successors.items()) if not place[1][0].beside),
        ]
        sites = [(i, site, module) for i, (site, module) in places if module is not None]
        # What methods install stands between the denoiser's front and those inside, so that these see what is run.
        inside = [self._put_front(*place) for place in sites if place[2] not in self._denoisers]
        self._fronts, self._installed = inside, []
        self._covered: list[Front] = []  # taken off while something else stood over them
        try:
            for method in self.methods:
                self._installed.append(method.install(denoiser, self._present))
        except ValueError:
            self.detach()
            raise
        self._fronts = [*inside, *(self._put_front(*place) for place in sites if place[2] in self._denoisers)]
        for front in self._fronts:
            front.holder = self

    def _present(self) -> Step:
        """The step that is running."""
        if self._course.present is None:
            raise RuntimeError("no generation is running, so there is no present step.")
        return self._course.present.column.step

    def _put_front(self, i: int, site: Site, module: nn.Module) -> Front:
        """Put our forward in front of a module's."""
        course, named = self._course, argument_reader(type(module).forward)

        def whole(original: Callable[..., Output]) -> Callable[..., Output]:
            return lambda *args, **kwargs: course.evaluate(i, site, original, named(args, kwargs))

        def inner(original: Callable[..., Output]) -> Callable[..., Output]:
            def forward(*args: Any, **kwargs: Any) -> Output:
                generation = course.present
                if generation is None or generation.unattended:
                    return original(*args, **kwargs)
                generation.traced.reached[i] = True
                opinions = generation.column.opinions[i]
                if not opinions:
                    return original(*args, **kwargs)
                return generation.carry_out(i, opinions, original, args, kwargs)

            return forward

        return Front(module, "forward", whole if site.kind in (Kind.MODEL, Kind.CONTROL) else inner)

    def _miss_the_denoiser(self) -> None:
        """The scheduler moves though the denoiser was not called: fine if another one was, but not if ours is lost."""
        if not all(front.reached for front in self._fronts[-len(self._denoisers) :]):
            raise RuntimeError(
                f"the forward of {type(self._denoiser).__name__} was put back after attaching, so no method is carried "
                "out. Offloading does this after every run: attach before you turn it on."
            )

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
        if self._course.latest is None:
            raise RuntimeError(
                f"no {what} yet: nothing was generated since attaching. whenwhere.plan(pipe, *methods, steps=N) tells "
                "beforehand."
            )
        return self._course.latest

    def _table(self, what: Literal["plan", "trace"], generation: Generation, columns: list[Column]) -> Plan:
        samples = generation.samples or (generation.branches.samples if generation.branches else 1)
        held = generation.memory.peak if what == "trace" else None
        model = type(self._denoiser).__name__
        notes = generation.notes if what == "trace" else ()
        return Plan.of(what, model, self.methods, self.sites, columns, self._course.units(), samples, held, notes)

    # -- the end -----------------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Give modules and scheduler back as they were found; again, to give back what something else stood over."""
        self._course.stop()
        outside = [front for front in self._fronts if front.owner in self._denoisers]
        inside = [front for front in self._fronts if front.owner not in self._denoisers]
        for front in (*self._covered, *reversed(outside)):
            front.remove()
        while self._installed:
            self._installed.pop()()
        for front in reversed(inside):
            front.remove()
        self._covered, self._fronts = [front for front in (*self._covered, *self._fronts) if front.covered], []

    def __repr__(self) -> str:
        return f"<{', '.join(map(repr, self.methods))} attached to {type(self._denoiser).__name__}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()
