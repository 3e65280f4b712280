"""Everything a training run would need to go on: weights, their running mean, optimiser, random numbers, time used."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import Parameter


@dataclass
class TrainState:
    """One run, changed in place by the loop. The exponential mean covers all that learns.

    Attributes:
        denoiser, text_encoder: a parameter that does not require a gradient is left alone.
    """

    denoiser: nn.Module
    text_encoder: nn.Module
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0
    step: int = 0
    images: int = 0
    seconds: float = 0.0
    parameters: list[Parameter] = field(init=False)
    mean: list[Tensor] = field(init=False)
    optimiser: torch.optim.AdamW = field(init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        both = [*self.denoiser.parameters(), *self.text_encoder.parameters()]
        self.parameters = [parameter for parameter in both if parameter.requires_grad]
        self.mean = [parameter.detach().clone() for parameter in self.parameters]
        self.optimiser = torch.optim.AdamW(
            self.parameters, self.learning_rate, betas=(0.9, 0.99), weight_decay=self.weight_decay, fused=True
        )
        self.generator = torch.Generator().manual_seed(self.seed)

    def average(self, decay: float) -> None:
        """Move the running mean towards the weights; early in the run it follows faster than `decay`."""
        reached = min(decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.mean, [parameter.detach() for parameter in self.parameters], 1 - reached)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The models hold the running mean inside this block, and their own weights again after it."""
        own = [parameter.detach().clone() for parameter in self.parameters]
        self.put(self.mean)
        try:
            yield
        finally:
            self.put(own)

    def put(self, values: list[Tensor]) -> None:
        """Copy these values into the models."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.detach().copy_(value)

    def save(self, path: Path) -> None:
        """Write the run to one file; a crash in the middle leaves the older file whole."""
        beside = path.with_suffix(".part")
        torch.save(
            {
                "parameters": [parameter.detach() for parameter in self.parameters],
                "mean": self.mean,
                "optimiser": self.optimiser.state_dict(),
                "generator": self.generator.get_state(),
                "step": self.step,
                "images": self.images,
                "seconds": self.seconds,
            },
            beside,
        )
        beside.replace(path)

    def load(self, path: Path) -> None:
        """Go back to what `save` wrote; the models must have the same shape."""
        saved = torch.load(path, map_location="cpu", weights_only=True)
        self.put(saved["parameters"])
        self.mean = [mean.to(own.device) for mean, own in zip(saved["mean"], self.parameters, strict=True)]
        self.optimiser.load_state_dict(saved["optimiser"])
        self.generator.set_state(saved["generator"])
        self.step, self.images, self.seconds = saved["step"], saved["images"], saved["seconds"]
