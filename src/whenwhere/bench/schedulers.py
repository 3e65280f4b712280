"""Schedulers by short names, set up from the configuration of a pipeline's own."""

import copy
from typing import Any

from ..spelling import did_you_mean

SHORT_NAMES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
# PNDM as Stable Diffusion ships it: without the Runge-Kutta start, which costs nine more evaluations.
_SETTINGS: dict[str, dict[str, Any]] = {"pndm": {"skip_prk_steps": True}}


def make_scheduler(name: str, own: Any) -> Any:
    """The scheduler called `name`, with the noise schedule and prediction type of the pipeline's own.

    Args:
        name: a short name, or the name of a class in diffusers.
        own: the pipeline's scheduler.

    Raises:
        ValueError: unknown name (the message names the nearest), or one that does not work with this model.
    """
    import diffusers

    key = name.lower()
    cls = getattr(diffusers, SHORT_NAMES.get(key, name), None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise ValueError(
            f"no scheduler is called {name!r}{did_you_mean(name, SHORT_NAMES)} Short names: {', '.join(SHORT_NAMES)}; "
            "class names of diffusers work too."
        )
    if (cls.__name__.startswith("FlowMatch")) != type(own).__name__.startswith("FlowMatch"):
        raise ValueError(f"{cls.__name__} does not fit a model that was trained for {type(own).__name__}.")
    made: Any = cls
    return made.from_config(own.config, **_SETTINGS.get(key, {}))


def evaluations(scheduler: Any, steps: int) -> int:
    """How often the denoiser runs for so many inference steps; the scheduler itself is left as it is.

    Raises:
        ValueError: the scheduler cannot run so many.
    """
    trial = copy.deepcopy(scheduler)
    trial.set_timesteps(steps)
    return len(trial.timesteps)
