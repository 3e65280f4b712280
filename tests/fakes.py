"""A network, a scheduler, a pipeline and a method whose arithmetic a reader checks by hand: every block doubles."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from whenwhere import Method
from whenwhere.anatomy import Anatomy, Part
from whenwhere.clock import Step
from whenwhere.decision import Compute, Decision, Reuse, whole
from whenwhere.site import Kind, Site


class Double(nn.Module):
    """One multiply-add per row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[2.0]]), requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.linear(hidden_states, self.weight)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Double()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.attn(hidden_states)


class Tower(nn.Module):
    """Blocks in a row, (rows, 1) -> (rows, 1)."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, hidden_states: Tensor, timestep: Tensor | None = None) -> Tensor:  # noqa: ARG002
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


TOWER = Anatomy(
    model="Tower",
    parts=(
        Part(Kind.MODEL, ""),
        Part(Kind.BLOCK, "blocks.*"),
        Part(Kind.SELF_ATTENTION, "blocks.*.attn"),
    ),
    sequence=(("blocks",), ("attn",)),
    rows=("hidden_states",),
)


class Counting:
    """A scheduler that counts down and moves nothing."""

    def __init__(self) -> None:
        self.timesteps = torch.zeros(0)

    def set_timesteps(self, num_inference_steps: int) -> None:
        self.timesteps = torch.arange(num_inference_steps, 0, -1)

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> Tensor:  # noqa: ARG002
        return model_output


class Pipeline:
    """Gives the network one input per step and returns what it makes of them."""

    def __init__(self, blocks: int) -> None:
        self.transformer = Tower(blocks)
        self.scheduler = Counting()
        self.do_classifier_free_guidance = False

    def __call__(self, inputs: list[Any]) -> list[Any]:
        """A number is one row; a pair is a guidance batch, unconditional first."""
        self.do_classifier_free_guidance = isinstance(inputs[0], tuple)
        self.scheduler.set_timesteps(len(inputs))
        outputs = []
        for value, timestep in zip(inputs, self.scheduler.timesteps, strict=True):
            batch = torch.tensor(value).reshape(-1, 1)
            output = self.transformer(batch, timestep)
            self.scheduler.step(output, timestep, batch[:1])
            rows = output.flatten().tolist()
            outputs.append(tuple(rows) if isinstance(value, tuple) else rows[0])
        return outputs


def doubling_pipeline(blocks: int) -> Pipeline:
    return Pipeline(blocks)


class Nesting(Method):
    """A method that goes with others of its kind."""

    def conflict(self, other: Method, sites: Sequence[Site]) -> str:  # noqa: ARG002
        return ""


@dataclass(frozen=True)
class Every(Nesting):
    """Blocks are computed every so many steps and reused in between."""

    interval: int = 2

    kinds: ClassVar = frozenset({Kind.BLOCK})
    idle_reason: ClassVar = "choose a larger interval."

    def decide(self, site: Site, step: Step) -> Decision | None:  # noqa: ARG002
        return Compute(whole) if step.index % self.interval == 0 else Reuse()


def own_loop(denoiser: nn.Module, scheduler: Any, steps: int) -> Tensor:
    """A loop of one's own around a U-Net, without a pipeline."""
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 6, 16, generator=generator)
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            noise = denoiser(encoder_hidden_states=text, sample=sample, timestep=timestep).sample
        sample = scheduler.step(noise, timestep, sample).prev_sample
    return sample
