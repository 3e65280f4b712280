"""Planning before anything runs: the table and its cost, for a pipeline, a model or a published architecture's name."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from . import architectures
from .anatomy import Anatomy, find
from .clock import Scheduler, Step, lay_out
from .families import FAMILIES, PIPELINES
from .finding import denoiser_of, modules_of, refuse_strangers
from .method import Method, Setting
from .plan import Plan
from .pricing.cost import price_or_reason
from .pricing.examples import example_of, example_of_control
from .pricing.unit import Unit
from .ranges import at_least, true_or_false
from .schedule import handover, noise_levels
from .setting import configuration_of, known
from .site import Kind, Site
from .table import lay


def plan(
    model: Any,
    *methods: Method,
    steps: int,
    guidance: bool = True,
    images: int = 1,
    scheduler: Scheduler | None = None,
    anatomy: Anatomy | None = None,
) -> Plan:
    """What methods will do and cost, before anything runs; weights are not needed.

    Args:
        model: a diffusers pipeline, its denoiser, or the name of a published architecture such as "sdxl" (see
            `whenwhere.architectures.names()`).
        methods: as for `attach`; without any, the plain run.
        steps: evaluations of the denoiser. Solvers of second order evaluate nearly twice per inference step.
        guidance: whether classifier-free guidance is on, not its scale. Models with distilled guidance have one branch
            anyway.
        images: images, or videos, generated at once.
        scheduler: where methods go by timesteps: a scheduler whose timesteps are set, as the pipeline would set them.
        anatomy: for a model family that the library does not know.

    Raises:
        ValueError: unknown name or family, a method that does not fit the model or the number of steps, a number below
            1.
        TypeError: something is no method, or of another type than it should be.
    """
    return Planner(model, steps, guidance, images, scheduler, anatomy).plan(*methods)


class Planner:
    """Plans of many methods for one model and schedule: what its sites cost is learnt once. Arguments as for `plan`."""

    def __init__(
        self,
        model: Any,
        steps: int,
        guidance: bool = True,
        images: int = 1,
        scheduler: Scheduler | None = None,
        anatomy: Anatomy | None = None,
    ) -> None:
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
        at_least(1, images=images)
        true_or_false("guidance", guidance)
        self._denoiser, self._examples = _denoiser_and_examples(model)
        self._anatomy = anatomy = anatomy or find(self._denoiser, FAMILIES)
        self._pipe = self._denoiser if isinstance(model, str) else model
        self._images = images
        roles = PIPELINES.get(type(model).__name__, anatomy.roles)
        guided, separate = guidance and _guided(model, self._denoiser), len(anatomy.passes)
        branches = len(roles) if guided and not separate else 1
        passes = separate if guided and separate else 1
        self._steps = _steps(steps, branches, passes, scheduler)
        self._setting = Setting(
            steps,
            None if scheduler is None else type(scheduler).__name__,
            configuration=configuration_of(scheduler),
            timesteps=known(self._steps[0].timesteps),
        )
        self._handover = None if scheduler is None else handover(model, scheduler)
        self._units: dict[tuple[Site, ...], list[Unit] | str] = {}  # of the sites that some methods ask about

    def plan(self, *methods: Method) -> Plan:
        """What methods will do and cost.

        Raises:
            ValueError: a method does not fit the model or the number of steps.
        """
        refuse_strangers(methods)
        fitted = (method.fit(self._denoiser) for method in methods)
        ordered = tuple(sorted(fitted, key=lambda method: method.innermost))
        modules = modules_of(self._pipe, self._anatomy, ordered)
        for method in ordered:
            method.review(self._setting)
        sites = tuple(modules)
        columns = lay(sites, ordered, self._steps, self._handover)
        if sites not in self._units:
            self._units[sites] = price_or_reason(modules, self._examples)
        model = type(self._denoiser).__name__
        return Plan.of("plan", model, ordered, sites, columns, self._units[sites], self._images)


def _denoiser_and_examples(model: Any) -> tuple[nn.Module, dict[Kind, dict[str, Any]]]:
    if isinstance(model, str):
        return architectures.build(model), {Kind.MODEL: architectures.example(model, rows=1)}
    denoiser, control = denoiser_of(model), getattr(model, "controlnet", None)
    examples = {Kind.MODEL: example_of(denoiser, getattr(model, "tokenizer", None))}
    if isinstance(control, nn.Module):
        examples[Kind.CONTROL] = example_of_control(control, examples[Kind.MODEL])
    return denoiser, examples


def _guided(model: Any, denoiser: nn.Module) -> bool:
    """Whether the model is normally run with classifier-free guidance."""
    if isinstance(model, str):
        return architectures.architecture(model).guided
    return getattr(getattr(denoiser, "config", None), "time_cond_proj_dim", None) is None


def _steps(count: int, branches: int, passes: int, scheduler: Scheduler | None) -> list[Step]:
    timesteps: Sequence[float | None] = [None] * count
    sigmas: Sequence[float | None] = ()
    if scheduler is not None:
        timesteps = [float(t) for t in scheduler.timesteps]
        if len(timesteps) != count:
            raise ValueError(f"the scheduler has {len(timesteps)} timesteps set, the plan is for {count} steps.")
        sigmas = noise_levels(scheduler, timesteps)
    return lay_out(timesteps, branches, passes, sigmas)
