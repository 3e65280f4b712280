"""What is known of a generation before its first step, and how two generations are told apart."""

import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from .anatomy import Role
from .clock import Scheduler
from .method import Setting


def setting_of(
    pipe: object,
    scheduler: Scheduler,
    sample: Any,
    timesteps: Sequence[float | None],
    skipped: int,
    declared: tuple[Role, ...] | None,
    handover: int | None,
) -> Setting:
    """The setting of a generation that begins.

    Args:
        pipe, scheduler: of the generation.
        sample: what enters the denoiser, (R, ...).
        timesteps: that will be executed; `None` where nobody asked for them.
        skipped: see `Setting`.
        declared: the guidance branches, where somebody declares them.
        handover: the step at which a second denoiser takes over; `None` where there is none.
    """
    scale, steps = getattr(pipe, "guidance_scale", None), len(timesteps)
    return Setting(
        steps,
        type(scheduler).__name__,
        scale if isinstance(scale, int | float) else None,  # a video may have one for every frame
        tuple(sample.shape[1:]),
        skipped,
        branches=None if declared is None else len(declared),
        configuration=configuration_of(scheduler),
        timesteps=known(timesteps),
        handover=steps if handover is None else min(handover, steps),
    )


def known(timesteps: Sequence[float | None]) -> tuple[float, ...] | None:
    """Timesteps that are all known, or `None`."""
    found = tuple(timestep for timestep in timesteps if timestep is not None)
    return found if len(found) == len(timesteps) else None


def configuration_of(made: object) -> str | None:
    """The arguments that a scheduler or denoiser was made with, as JSON; `None` where it keeps no `config`.

    Those at their defaults are left out, so that versions of diffusers that have further ones tell the same.
    """
    config = getattr(made, "config", None)
    if not isinstance(config, Mapping):
        return None
    arguments = inspect.signature(type(made).__init__).parameters.items()
    given = {name: _plain(config[name]) for name, argument in arguments if name in config}
    return json.dumps({n: v for n, v in given.items() if v != _plain(dict(arguments)[n].default)}, sort_keys=True)


def _plain(value: object) -> object:
    """As it comes back from a file: lists for tuples."""
    return json.loads(
        json.dumps(value, default=lambda other: other.tolist() if hasattr(other, "tolist") else str(other))
    )


def differing(one: Setting, other: Setting) -> Iterator[tuple[str, str, str]]:
    """Whatever is known of both and differs: its name, and the two values."""
    for field in fields(Setting):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if a is None or b is None or a == b:
            continue
        if field.name == "configuration":
            yield from differing_arguments(a, b)
        elif field.name != "timesteps" or not same_timesteps(a, b):
            yield field.name, repr(a), repr(b)


def differing_arguments(one: str, other: str) -> Iterator[tuple[str, str, str]]:
    """Every argument that differs between two configurations: its name, and the two values."""
    a, b = json.loads(one), json.loads(other)
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b or a[name] != b[name]:
            yield name, *(repr(made[name]) if name in made else "the default" for made in (a, b))


def refuse_another(what: str, told: str | None, denoiser: object) -> None:
    """Refuse what belongs to a denoiser that was made otherwise than this one, where both are known.

    Raises:
        ValueError: an argument differs.
    """
    made, model = configuration_of(denoiser), type(denoiser).__name__
    for name, there, here in differing_arguments(told, made) if told and made else ():
        raise ValueError(
            f"{what} is of a {model} with {name} {there}, but this one has {here}; make one for this model."
        )


def same_timesteps(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two schedules are the same, but for what devices round differently."""
    return len(one) == len(other) and all(
        math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6) for a, b in zip(one, other, strict=True)
    )
