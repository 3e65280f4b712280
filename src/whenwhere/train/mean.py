"""The exponential running mean (EMA) of weights: what a diffusion model is judged and saved with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter


class RunningMean:
    """Follows some weights, and lends itself to their model.

    Attributes:
        weights: what is followed.
        values: their mean, one tensor each.
    """

    def __init__(self, weights: list[Parameter]) -> None:
        self.weights = weights
        self.values = [weight.detach().clone() for weight in weights]

    def follow(self, step: int, decay: float) -> None:
        """Move towards the weights after `step` steps; early in a run the mean is faster than `decay`."""
        reached = min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [weight.detach() for weight in self.weights], 1 - reached)

    @contextmanager
    def held(self) -> Iterator[None]:
        """The model holds the mean inside this block, and its own weights again after it."""
        own = [weight.detach().clone() for weight in self.weights]
        self.put(self.values)
        try:
            yield
        finally:
            self.put(own)

    def put(self, values: list[Tensor]) -> None:
        """Copy these values into the model."""
        for weight, value in zip(self.weights, values, strict=True):
            weight.detach().copy_(value)

    def load(self, values: list[Tensor]) -> None:
        """Go on from a saved mean."""
        self.values = [value.to(weight.device) for value, weight in zip(values, self.weights, strict=True)]
