"""A run of a class-conditional training as a thing that can be stopped and taken up: weights, mean, optimiser, stage.

No state of random numbers is kept: every step has a generator of its own, made from the seed, the step and the process,
so that a resumed run sees what it would have seen, and two models trained with one seed see the same pictures, noise
and timesteps.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from whenwhere.train.files import save_whole
from whenwhere.train.mean import RunningMean
from whenwhere.train.skip import Stage, enter_stage

BETAS = (0.9, 0.999)


class ClassRun:
    """One run, changed in place by the loop.

    Attributes:
        model: the network itself, in float32.
        wrapped: what `accelerate` made of it; this one is called in training.
        mean: the exponential mean of all weights, in the order of `model.parameters()`.
        stage: "skips" while all but the long skips is frozen, "all" otherwise.
        step, seconds: used so far, over all resumptions.
        clipped, dropped: steps since the last log line whose gradient was clipped, or not finite and so not taken.
        validations: losses of the mean on pictures set apart, in this stage.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, learning_rate: float, stage: Stage) -> None:
        self.model, self.accelerator, self.learning_rate = model.to(accelerator.device), accelerator, learning_rate
        self.mean = RunningMean(list(self.model.parameters()))
        self.step, self.seconds, self.clipped, self.dropped = 0, 0.0, 0, 0
        self.enter(stage)

    def enter(self, stage: Stage) -> None:
        """Begin a stage: another set of trained weights, and a fresh optimiser for them."""
        self.stage: Stage = stage
        self.validations: list[float] = []
        self.accelerator.free_memory()
        weights = enter_stage(self.model, stage)
        optimiser = torch.optim.AdamW(weights, self.learning_rate, betas=BETAS, weight_decay=0.0, fused=True)
        self.wrapped, self.optimiser = self.accelerator.prepare(self.model, optimiser)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The weights that this stage trains."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def generator(self, seed: int) -> torch.Generator:
        """The random numbers of the next step."""
        number = (seed * 10_000_000 + self.step) * 4096 + self.accelerator.process_index
        return torch.Generator().manual_seed(number)

    def save(self, path: Path) -> None:
        """Write the run to one file, from the main process."""
        if not self.accelerator.is_main_process:
            return
        content = {name: getattr(self, name) for name in ("stage", "step", "seconds", "validations")}
        content |= {"parameters": [p.detach() for p in self.model.parameters()]}
        content |= {"mean": self.mean.values, "optimiser": self.optimiser.state_dict()}
        save_whole(content, path)

    def load(self, path: Path) -> None:
        """Go back to what `save` wrote.

        Raises:
            ValueError: the file is damaged, or of a network of another shape.
        """
        try:
            saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged pickle raises
            raise ValueError(f"{path} is damaged and cannot be resumed ({error}); remove it to start anew") from error
        shapes = [tuple(parameter.shape) for parameter in self.model.parameters()]
        found = [tuple(tensor.shape) for tensor in saved["parameters"]]
        if shapes != found:
            raise ValueError(
                f"{path} is a run of another network: {len(found)} weights against {len(shapes)} here, or other "
                "shapes. Use another folder, or the settings that it was begun with."
            )
        if saved["stage"] != self.stage:
            self.enter(saved["stage"])
        self.mean.put(saved["parameters"])
        self.mean.load(saved["mean"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.step, self.seconds, self.validations = saved["step"], saved["seconds"], saved["validations"]

    def snapshot(self, folder: Path) -> None:
        """Write the mean in half precision as `folder/STEP.safetensors`, under the network's own names."""
        if self.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            names = [name for name, _ in self.model.named_parameters()]
            half = {name: mean.half().cpu() for name, mean in zip(names, self.mean.values, strict=True)}
            save_file(half, folder / f"{self.step:07d}.safetensors")
