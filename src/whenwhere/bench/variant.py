"""Variants: what is run and compared; tasks: on what."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from ..expression import Item, parse, write, write_full
from ..guidance.steering import Steering
from ..method import Method
from ..methods import CFG, FewerSteps
from .drawing import draw
from .model import Model


@dataclass(frozen=True)
class Variant:
    """One way to run a pipeline: methods on it, or fewer steps, or neither.

    Attributes:
        items: the methods, the outermost first; `FewerSteps` among them says how many steps are run.
    """

    items: tuple[Item, ...] = ()

    @classmethod
    def of(cls, text: str) -> Self:
        """The variant that an expression such as "tgate(gate_step=10)" names; see `whenwhere.expression.parse`."""
        return cls(parse(text))

    @property
    def methods(self) -> tuple[Method, ...]:
        """What is attached."""
        return tuple(item for item in self.items if isinstance(item, Method))

    @property
    def label(self) -> str:
        """Its expression, without defaults; "plain" for neither methods nor fewer steps."""
        return write(self.items) or "plain"

    @property
    def expression(self) -> str:
        """Its expression with every field, which stays the same when a default changes."""
        return write_full(self.items) or "plain"

    def told(self, negative: str) -> Self:
        """With a negative text for the methods that steer away from one and were given none."""
        if not negative:
            return self
        return replace(self, items=tuple(_told(item, negative) for item in self.items))

    def steps(self, asked: int) -> int:
        """Inference steps that are run when so many were asked for."""
        return min((item.steps for item in self.items if isinstance(item, FewerSteps)), default=asked)

    def negative(self, asked: str) -> str:
        """The negative text of the pipeline's own guidance when so much was asked for."""
        return next((item.negative_prompt for item in self.items if isinstance(item, CFG)), asked)


def _told(item: Item, negative: str) -> Item:
    if isinstance(item, Steering) and item.negative_prompt is None and item.negative_prompt_embeds is None:
        return replace(item, negative_prompt=negative)
    return item


PLAIN = Variant()


@dataclass(frozen=True)
class Task:
    """What is drawn: every prompt from every seed, so many times.

    Attributes:
        model: the pipeline.
        prompts, seeds: all their pairs are drawn. `DiTPipeline` takes class numbers or labels as prompts.
        runs: measured runs of every pair and variant.
        steps: inference steps.
        guidance: guidance scale; at most 1 means none.
        negative: negative prompt; empty for none.
        size: height and width; `None` for the model's own.
    """

    model: Model
    prompts: Sequence[str]
    seeds: Sequence[int]
    runs: int
    steps: int
    guidance: float
    negative: str = ""
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ValueError("give at least one prompt, and none that is empty.")
        if not self.seeds or self.runs < 1 or self.steps < 1:
            raise ValueError(
                f"seeds, runs and steps must be at least 1, got {len(self.seeds)}, {self.runs} and {self.steps}."
            )
        if not self.guidance >= 0:
            raise ValueError(f"guidance must be at least 0, got {self.guidance}.")


def draw_one(task: Task, variant: Variant, prompt: str, seed: int) -> Tensor:
    """One picture (3, H, W) of a task; the variant's methods are attached by the caller."""
    steps = variant.steps(task.steps)
    negative = variant.negative(task.negative)
    return draw(task.model.pipeline, [prompt], [seed], steps, task.guidance, negative, task.size)[0]
