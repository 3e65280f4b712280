"""Compiling what lies inside of sites: decisions stay Python, and what they decide about becomes kernels.

A graph that holds a decision is compiled anew whenever the decision changes. So the largest modules are compiled that
hold no other site; the decisions between them are carried out by Python as ever.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .anatomy import find
from .families import FAMILIES
from .finding import denoiser_of, modules_of
from .method import Method
from .site import Kind


@contextmanager
def compile_inside(pipe: Any, *methods: Method, **options: Any) -> Iterator[int]:
    """Compile the denoiser of a pipeline inside of the sites that methods ask about; attach them within.

    Afterwards every module is as it was found.

    Args:
        pipe: as for `attach`.
        methods: that will be attached.
        options: of `torch.compile`, for example `backend` or `mode`.

    Yields:
        How many modules are compiled.

    Raises:
        ValueError: a method does not fit, or is attached already.
    """
    denoiser = denoiser_of(pipe)
    sites = modules_of(pipe, find(denoiser, FAMILIES), methods)
    if any("forward" in vars(module) for module in sites.values() if module is not None):
        raise ValueError("something is attached already; compile first and attach within.")
    paths = {site.path for site, module in sites.items() if module is not None and site.kind is not Kind.CONTROL}
    chosen = _largest_without(denoiser, "", paths)
    before = [(module, vars(module).get("forward")) for module in chosen]
    try:
        for module in chosen:
            vars(module)["forward"] = torch.compile(module.forward, **options)
        yield len(chosen)
    finally:
        for module, forward in before:
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward


def _largest_without(module: nn.Module, path: str, sites: set[str]) -> Sequence[nn.Module]:
    """The outermost modules, with weights, inside of which there is no site."""
    start = f"{path}." if path else ""
    holds_sites = any(site != path and site.startswith(start) for site in sites)
    if holds_sites or type(module).forward is nn.Module.forward:  # lists of modules are never called
        found = (_largest_without(child, f"{start}{name}", sites) for name, child in module.named_children())
        return [inner for some in found for inner in some]
    return [module] if any(True for _ in module.parameters()) else []
