"""Everything a training run would need to go on: weights, their running mean, optimiser, random numbers, time used."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from whenwhere.train.files import save_whole
from whenwhere.train.mean import RunningMean


@dataclass
class TrainState:
    """One run, changed in place by the loop. The exponential mean covers all that learns.

    Attributes:
        denoiser, text_encoder: a parameter that does not require a gradient is left alone.
        hidden: matrices among them that Muon teaches (Jordan et al., 2024), scaled to the learning rate of AdamW
            (Liu et al., 2025, https://arxiv.org/abs/2502.16982), which teaches the rest. Needs PyTorch 2.9.
    """

    denoiser: nn.Module
    text_encoder: nn.Module
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0
    hidden: Sequence[Parameter] = ()
    step: int = 0
    images: int = 0
    seconds: float = 0.0
    parameters: list[Parameter] = field(init=False)
    mean: RunningMean = field(init=False)
    optimisers: list[Optimizer] = field(init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        both = [*self.denoiser.parameters(), *self.text_encoder.parameters()]
        self.parameters = [parameter for parameter in both if parameter.requires_grad]
        self.mean = RunningMean(self.parameters)
        apart = {id(parameter) for parameter in self.hidden}
        rest = [parameter for parameter in self.parameters if id(parameter) not in apart]
        rate, decay = self.learning_rate, self.weight_decay
        self.optimisers = [torch.optim.AdamW(rest, rate, betas=(0.9, 0.99), weight_decay=decay, fused=True)]
        if self.hidden:
            self.optimisers.append(
                torch.optim.Muon(self.hidden, rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            )
        self.generator = torch.Generator().manual_seed(self.seed)

    def save(self, path: Path) -> None:
        """Write the run to one file."""
        content = {
            "parameters": [parameter.detach() for parameter in self.parameters],
            "mean": self.mean.values,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "generator": self.generator.get_state(),
            "step": self.step,
            "images": self.images,
            "seconds": self.seconds,
        }
        save_whole(content, path)

    def load(self, path: Path) -> None:
        """Go back to what `save` wrote; the models must have the same shape."""
        saved = torch.load(path, map_location="cpu", weights_only=True)
        self.mean.put(saved["parameters"])
        self.mean.load(saved["mean"])
        for optimiser, its in zip(self.optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(its)
        self.generator.set_state(saved["generator"])
        self.step, self.images, self.seconds = saved["step"], saved["images"], saved["seconds"]
