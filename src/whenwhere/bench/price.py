"""The price of a variant: planned and counted multiply-adds, planned and held bytes, learnt from one run."""

import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ..anatomy import find
from ..clock import Step
from ..decision import Decision
from ..families import FAMILIES
from ..finding import denoiser_of
from ..layout import declared_roles
from ..method import Method
from ..plan import Plan
from ..pricing.cost import Macs, count
from ..site import Kind, Site
from .drawing import attached
from .stopwatch import Stopwatch
from .variant import Task, Variant, draw_one


@dataclass(frozen=True)
class Price:
    """What a variant costs for one picture.

    Attributes:
        evaluations: updates of the sample.
        branches: guidance branches in a batch, or separate guidance calls in a step.
        planned, counted: multiply-adds of the denoiser, as the plan says and as they happened (`None`: not counted).
        planned_bytes, held_bytes: the most that the memory holds, as the plan says and as measured.
        plan: the plan itself.
    """

    evaluations: int
    branches: int
    planned: Macs
    counted: Macs | None
    planned_bytes: int
    held_bytes: int
    plan: Plan


@dataclass(frozen=True)
class _Onlooker(Method):
    """No opinion anywhere: attached to learn what a plain run costs."""

    kinds: ClassVar = frozenset({Kind.MODEL})

    def decide(self, site: Site, step: Step) -> Decision | None:  # noqa: ARG002
        """Nothing."""
        return None


def price(task: Task, variant: Variant, counting: bool = True) -> Price:
    """Run a variant once, untimed.

    Args:
        task: of which the first prompt and seed are run.
        variant: what to price.
        counting: whether to count multiply-adds while they happen, which takes several times as long.

    Raises:
        ValueError: a method does not fit the model, the steps or the guidance.
    """
    pipe, denoiser = task.model.pipeline, denoiser_of(task.model.pipeline)
    methods = variant.methods or (_Onlooker(),)
    watch = Stopwatch(pipe, task.model.device)

    def run() -> Tensor:
        return draw_one(task, variant, task.prompts[0], task.seeds[0])

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"_Onlooker\(\) changed nothing")
        with attached(pipe, methods, task.guidance) as attachment, watch:
            assert attachment is not None  # there are methods
            _, counted = count(run, denoiser) if counting else (run(), None)
        plan = attachment.plan
        held = attachment.trace.held if variant.methods else 0
    roles = declared_roles(pipe, find(denoiser, FAMILIES))
    declared = len(roles) if roles is not None else len(find(denoiser, FAMILIES).roles) if task.guidance > 1 else 1
    return Price(
        evaluations=watch.evaluations,
        branches=max(declared, plan.steps // watch.evaluations),
        planned=plan.priced.macs,
        counted=counted,
        planned_bytes=plan.priced.bytes,
        held_bytes=held or 0,
        plan=plan if variant.methods else replace(plan, methods=()),
    )
