"""The routed model within another one, and its knob for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .call import Knob
from .causal import RoutedCausalLM


def find(model: nn.Module) -> Any:
    """The routed model within a model, which adapters or parallel wrappers may surround.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module, RoutedCausalLM):
            return module
    raise ValueError(f"{type(model).__name__} is not routed; see whenwhere.lm.route.")


@contextmanager
def turned(model: nn.Module, setting: Knob) -> Iterator[None]:
    """Within this context the knob stands so, for every call that asks for nothing else."""
    routed = find(model)
    before, routed.knob = routed.knob, setting
    try:
        yield
    finally:
        routed.knob = before
