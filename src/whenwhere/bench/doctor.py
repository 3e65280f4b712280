"""An examination of a pipeline: its family, which methods fit and what they would save, and what is in the way."""

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import methods
from ..anatomy import find
from ..expression import parse, write
from ..families import FAMILIES
from ..finding import denoiser_of
from ..method import Method
from ..planning import plan

# Where a default counts steps, a fraction fits schedules of any length.
_FITTED = {"TGate": "tgate(gate_step=0.4)", "GuidanceStop": "guidancestop(step=0.5)"}


@dataclass(frozen=True)
class Treatment:
    """What one method would do.

    Attributes:
        method: its name.
        label: the expression that was planned; empty where it could not be written down.
        ratio, ratio_papers: how many times fewer multiply-adds, in both conventions; `None` where it does not fit.
        bytes: the most that it would remember for one picture.
        reason: why it does not fit, or what it warns of; empty for nothing.
    """

    method: str
    label: str
    ratio: float | None
    ratio_papers: float | None
    bytes: int
    reason: str

    @property
    def fits(self) -> bool:
        """Whether it can be attached."""
        return self.ratio is not None


@dataclass(frozen=True)
class Examination:
    """What was found.

    Attributes:
        pipeline, denoiser, scheduler: class names.
        family: the anatomy that describes the denoiser; empty for none.
        evaluations: of the denoiser, at the steps asked for.
        guided: whether classifier-free guidance was assumed.
        treatments: those that fit first, by what they save.
        obstacles: what is in the way, in words, with what to do.
    """

    pipeline: str
    denoiser: str
    scheduler: str
    family: str
    evaluations: int
    guided: bool
    treatments: list[Treatment]
    obstacles: list[str]


def examine(pipe: Any, steps: int, guidance: float) -> Examination:
    """Look at a pipeline without running it; every method is planned with its published defaults.

    Args:
        pipe: a diffusers pipeline.
        steps: inference steps to plan for.
        guidance: guidance scale; at most 1 means none.

    Raises:
        TypeError: there is no denoiser, or guidance is a truth value.
    """
    if isinstance(guidance, bool):
        raise TypeError(f"guidance is a scale, such as 7.5, or 1 for none; got {guidance!r}")
    denoiser = denoiser_of(pipe)
    obstacles = list(_obstacles(pipe, denoiser))
    scheduler, evaluations = None, steps
    if _tells_time(pipe):
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(steps)
        evaluations = len(scheduler.timesteps)
    treatments: list[Treatment] = []
    family = ""
    try:
        family = find(denoiser, FAMILIES).model
    except ValueError as error:
        obstacles.append(str(error))
    if family:
        candidates = [name for name in methods.__all__ if issubclass(getattr(methods, name), Method)]
        treatments = [_treat(pipe, name, evaluations, guidance > 1, scheduler) for name in candidates]
    return Examination(
        pipeline=type(pipe).__name__,
        denoiser=type(denoiser).__name__,
        scheduler=type(getattr(pipe, "scheduler", None)).__name__,
        family=family,
        evaluations=evaluations,
        guided=guidance > 1,
        treatments=sorted(treatments, key=lambda treatment: -(treatment.ratio or 0)),
        obstacles=obstacles,
    )


def _treat(pipe: Any, name: str, evaluations: int, guided: bool, scheduler: Any) -> Treatment:
    """One method, planned."""
    label = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            items = parse(_FITTED.get(name, f"{name}()"))
            label = write(items)
            attached = [item for item in items if isinstance(item, Method)]
            cost = plan(pipe, *attached, steps=evaluations, guidance=guided, scheduler=scheduler).priced
        except (ValueError, TypeError) as error:
            return Treatment(name, label, None, None, 0, _line(error))
    papers = cost.baseline.papers / cost.macs.papers
    return Treatment(name, label, cost.ratio, papers, cost.bytes, "; ".join(_line(w.message) for w in caught))


def _line(message: Warning | Exception | str) -> str:
    return " ".join(str(message).split())


def _tells_time(pipe: Any) -> bool:
    scheduler = getattr(pipe, "scheduler", None)
    return all(hasattr(scheduler, name) for name in ("set_timesteps", "step", "timesteps"))


def _obstacles(pipe: Any, denoiser: nn.Module) -> Iterator[str]:
    """What is known to go wrong, or to cost what a method saves."""
    if not _tells_time(pipe):
        found = type(getattr(pipe, "scheduler", None)).__name__
        yield (
            f"the scheduler {found} has no set_timesteps, step and timesteps, so nobody tells which step it is: "
            "give the pipeline one of diffusers' schedulers."
        )
    networks = (getattr(pipe, "unet", None), getattr(pipe, "transformer", None), *denoiser.modules())
    if any(hasattr(network, "_orig_mod") for network in networks):
        yield (
            "the denoiser is compiled: decisions are carried out inside it, and every new set of decisions may be "
            "compiled anew. Warm up with the method attached, and measure."
        )
    if any(hasattr(module, "_hf_hook") for module in denoiser.modules()):
        yield (
            "an offloading hook sits on the denoiser: attach methods first and turn offloading on afterwards, or "
            "taking the hook off puts the plain forward back."
        )
    if getattr(denoiser, "is_cache_enabled", False):
        yield "a cache of diffusers is enabled on the denoiser: two would decide at once. Call disable_cache() first."
