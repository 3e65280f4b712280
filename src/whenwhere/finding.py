"""Finding what methods are attached to: the denoiser of a pipeline, and those of its sites that a method asks about."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from typing import Any

from torch import nn

from .anatomy import Anatomy, walk
from .front import Front
from .method import Method
from .site import Kind, Site


def refuse_strangers(methods: Sequence[object]) -> None:
    """What is attached or planned are methods.

    Raises:
        TypeError: something is none.
    """
    for method in methods:
        if isinstance(method, Method):
            continue
        name = method.__name__ if isinstance(method, type) else type(method).__name__
        if isinstance(method, type) and issubclass(method, Method):
            hint = f"write {name}(...), with its fields."
        elif isinstance(method, str):
            hint = "methods are objects such as TGate(gate_step=10); the command line alone takes text."
        else:
            hint = "methods are objects such as TGate(gate_step=10); FewerSteps and CFG are settings to compare with."
        raise TypeError(f"{method!r} is not a method; {hint}")


def denoiser_of(pipe: Any) -> nn.Module:
    """The network that a pipeline calls at every step; the first of two.

    Raises:
        TypeError: there is none.
    """
    return denoisers_of(pipe)[0]


def denoisers_of(pipe: Any) -> tuple[nn.Module, ...]:
    """The networks that a pipeline calls: one, or two, for high noise levels and for low (Wan 2.2).

    Raises:
        TypeError: there is none.
        ValueError: there are two that are not alike.
    """
    named = [getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2")]
    found = [network for network in named if isinstance(network, nn.Module)] or [pipe]
    if not isinstance(found[0], nn.Module):
        raise TypeError(f"{type(pipe).__name__} has neither a unet nor a transformer and is no module itself.")
    # A compiled module wraps the network; one network may serve both ends.
    networks = tuple(dict.fromkeys(getattr(network, "_orig_mod", network) for network in found))
    if len(networks) > 1 and _shape_of(networks[0]) != _shape_of(networks[1]):
        raise ValueError(
            f"{type(pipe).__name__} has two denoisers, {type(networks[0]).__name__} and {type(networks[1]).__name__}, "
            "whose modules differ; two of one shape are supported."
        )
    return networks


def _shape_of(network: nn.Module) -> list[tuple[str, type]]:
    return [(path, type(module)) for path, module in network.named_modules()]


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
    everything[Site(Kind.SCHEDULER, "scheduler", 0, 1, branched=anatomy.doubled)] = None
    return {site: everything[site] for site in choose(everything, methods, type(denoiser).__name__)}


def counterparts(modules: Mapping[Site, nn.Module | None], second: nn.Module) -> dict[Site, nn.Module | None]:
    """The modules of a second network of the same shape, by the same sites."""
    paths = dict(second.named_modules())
    inside = (site for site, module in modules.items() if module is not None and not site.beside)
    return {**modules, **{site: paths[site.path] for site in inside}}


def refuse_the_attached(denoiser: nn.Module, modules: Mapping[Site, nn.Module | None]) -> None:
    """No module of a denoiser has something of ours in front of it.

    Raises:
        ValueError: one has.
    """
    for site, module in modules.items():
        if module is None:
            continue
        if front_of(module) is not None:
            raise ValueError(
                f"{type(denoiser).__name__}: something is attached already (found at {site}). whenwhere.detach(pipe) "
                "takes it off; or pass all methods to one attach(pipe, ...)."
            )


def front_of(module: nn.Module) -> Front | None:
    """What of ours stands in front of a module, if anything does; what was taken off but is still held does not."""
    front: object = module.forward
    while front is not None:
        if isinstance(front, Front) and not front.removed:
            return front
        front = getattr(front, "__wrapped__", None)
    return None


def choose(sites: Iterable[Site], methods: Sequence[Method], model: str) -> list[Site]:
    """The sites that some method asks about, and the model.

    Raises:
        ValueError: a method refuses the model or another method, or finds no site it asks about.
    """
    everything = tuple(sites)
    for method in methods:
        method.check(everything, model)
        if not any(method.asks(site) for site in everything):
            raise ValueError(f"{method} asks about {', '.join(sorted(method.kinds))}; {model} has none of these.")
    for method, other in permutations(methods, 2):
        if reason := method.conflict(other, everything):
            raise ValueError(f"{method} does not go with {other}: {reason}")
    return [site for site in everything if site.kind is Kind.MODEL or any(method.asks(site) for method in methods)]
