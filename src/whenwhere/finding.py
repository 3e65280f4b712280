"""Finding what methods are attached to: the denoiser of a pipeline, and those of its sites that a method asks about."""

from collections.abc import Iterable, Mapping, Sequence
from inspect import unwrap
from typing import Any

from torch import nn

from .anatomy import Anatomy, walk
from .front import Front
from .method import Method
from .site import Kind, Site


def denoiser_of(pipe: Any) -> nn.Module:
    """The network that a pipeline calls at every step.

    Raises:
        TypeError: there is none.
        ValueError: there are two, of which one serves the high noise levels and one the low (Wan 2.2).
    """
    if isinstance(getattr(pipe, "transformer_2", None), nn.Module):
        raise ValueError(
            f"{type(pipe).__name__} has two denoisers, transformer and transformer_2, and only one would be treated; "
            "pipelines with one are supported."
        )
    candidates = (getattr(pipe, "unet", None), getattr(pipe, "transformer", None), pipe)
    for candidate in candidates:
        if isinstance(candidate, nn.Module):
            return getattr(candidate, "_orig_mod", candidate)  # a compiled module wraps it
    raise TypeError(f"{type(pipe).__name__} has neither a unet nor a transformer and is no module itself.")


def modules_of(pipe: Any, anatomy: Anatomy, methods: Sequence[Method]) -> dict[Site, nn.Module | None]:
    """The modules that some method asks about, and the model, by site, in the order of execution.

    The scheduler is a site too, at the end, and has no module.

    Raises:
        ValueError: a method refuses the model, or finds no site it asks about.
    """
    denoiser = denoiser_of(pipe)
    everything: dict[Site, nn.Module | None] = dict(walk(denoiser, anatomy))
    control = getattr(pipe, "controlnet", None)
    if isinstance(control, nn.Module):
        everything[Site(Kind.CONTROL, "controlnet", 0, 1)] = control
    everything[Site(Kind.SCHEDULER, "scheduler", 0, 1)] = None
    return {site: everything[site] for site in choose(everything, methods, type(denoiser).__name__)}


def refuse_the_attached(denoiser: nn.Module, modules: Mapping[Site, nn.Module | None]) -> None:
    """No module of a denoiser has something of ours in front of it.

    Raises:
        ValueError: one has.
    """
    for site, module in modules.items():
        if module is None:
            continue
        if isinstance(unwrap(module.forward, stop=lambda forward: isinstance(forward, Front)), Front):
            raise ValueError(
                f"{type(denoiser).__name__}: something is attached already (found at {site}). Detach it first, or "
                "pass all methods to one attach(pipe, ...)."
            )


def choose(sites: Iterable[Site], methods: Sequence[Method], model: str) -> list[Site]:
    """The sites that some method asks about, and the model.

    Raises:
        ValueError: a method refuses the model, or finds no site it asks about.
    """
    everything = tuple(sites)
    for method in methods:
        method.check(everything, model)
        if not any(method.asks(site) for site in everything):
            raise ValueError(f"{method} asks about {', '.join(sorted(method.kinds))}; {model} has none of these.")
    return [site for site in everything if site.kind is Kind.MODEL or any(method.asks(site) for method in methods)]
