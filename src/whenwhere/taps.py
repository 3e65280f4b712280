"""Taps: the forward of a module replaced for the length of one call.

With the projections of an attention tapped, its own processor can be run for a second text, watched and cut short. So
no processor is copied or exchanged: adapters, fused projections and attention backends stay in force.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from .front import Front

Forward = Callable[..., Any]
Tap = Callable[[Forward], Forward]  # from the module's own forward to what is called instead


@contextmanager
def tapped(taps: Mapping[nn.Module, Tap]) -> Iterator[None]:
    """Replace the forwards of these modules, and give them back whatever happens."""
    fronts: list[Front] = []
    try:
        for module, tap in taps.items():
            fronts.append(Front(module, "forward", tap))
        yield
    finally:
        while fronts:
            fronts.pop().remove()


def projections(attn: nn.Module, *names: str) -> dict[str, nn.Module]:
    """The children of an attention that have one of these names; the fused ones only where they are in use."""
    found = {name: getattr(attn, name, None) for name in names}
    fused = getattr(attn, "fused_projections", False)
    return {
        name: module
        for name, module in found.items()
        if isinstance(module, nn.Module) and (name in _NEVER_FUSED or ("kv" in name) == fused)
    }


_NEVER_FUSED = frozenset({"to_q"})
