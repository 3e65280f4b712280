"""Training of Block Caching's scale and shift (Wimbauer et al., CVPR 2024, https://arxiv.org/abs/2312.03209).

The student is the pipeline with its cache, and runs from pure noise through all steps as always. At every step the same
network without the cache is the teacher, on the student's own latents; the error between their outputs is one optimiser
step. Gradients end between steps. Only prompts are needed, no pictures.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..attach import attach
from ..clock import Step
from ..decision import Call, Decision, Output, Slot, map_tensors
from ..decisions.scaleshift import ScaleShift, channels
from ..finding import denoiser_of
from ..method import Method
from ..methods import BlockCaching
from ..ranges import at_least
from ..setting import configuration_of
from ..site import Kind, Site


def train_scale_shift(
    pipe: Any,
    method: BlockCaching,
    generate: Callable[[int], object],
    *,
    generations: int = 100,
    learning_rate: float = 1e-3,
    held_out: int = 1,
    validate_every: int = 10,
    patience: int = 3,
    watch: Callable[[int, float], None] | None = None,
    **options: Any,
) -> ScaleShift:
    """Train the scale and shift of a schedule, until the error on held-out generations no longer falls.

    Args:
        pipe: as for `attach`; its weights are not changed.
        method: whose schedule it is for; `dataclasses.replace(method, scale_shift=...)` then uses it.
        generate: calls the pipeline with everything as it will be used, with prompts and seed chosen by the number that
            it is given: 0, 1, ... to train on, and -1 ... -`held_out` to validate on.
        generations: at most so many are trained on.
        learning_rate: of AdamW, without weight decay.
        held_out, validate_every, patience: how many are validated on, after how many generations, and how often in a
            row without improvement until it ends.
        watch: is told the generations trained on and the validation error: the mean square of student to teacher.
        options: further arguments of `attach`.

    Returns:
        That of the least validation error; the identity if nothing was better.

    Raises:
        ValueError: a number below 1, a method that reuses nothing, or a `generate` that does not run the pipeline.
    """
    at_least(1, generations=generations, held_out=held_out, validate_every=validate_every, patience=patience)
    computed = method.table()
    if not any("." in row for row in computed.values()):
        raise ValueError(f"{method} reuses nothing, so there is nothing to adjust; raise its threshold.")
    seen = Seen(frozenset(computed))
    with attach(pipe, Observe(seen), **options):
        generate(-1)
    if not seen.widths:
        raise ValueError("generate(-1) did not run the pipeline; it must call the one that is given here.")
    widths = {path: seen.widths[path] for path, row in computed.items() if "." in row}
    found = ScaleShift(widths, seen.timesteps, computed, configuration_of(denoiser_of(pipe)))
    weights = list(found.parameters())
    lesson = Lesson(weights, torch.optim.AdamW(weights, learning_rate, weight_decay=0))
    best, least, since = copy.deepcopy(found), math.inf, 0
    with attach(pipe, Teach(lesson), replace(method, scale_shift=found), **options):
        for number in range(generations + 1):
            if number % validate_every == 0 or number == generations:
                error = lesson.validate(generate, held_out)
                if watch is not None:
                    watch(number, error)
                best, since = (copy.deepcopy(found), 0) if error < least else (best, since + 1)
                least = min(least, error)
            if since >= patience or number == generations:
                return best
            generate(number)
    raise AssertionError("unreachable: the last number returns")


@dataclass(eq=False)
class Seen:
    """What a plain generation shows: timesteps, and the channels of every unit's output."""

    paths: frozenset[str]
    timesteps: tuple[float, ...] = ()
    widths: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Observe(Method):
    """Computes everything, and notes the shapes."""

    seen: Seen = field(repr=False)

    kinds: ClassVar = frozenset(Kind) - {Kind.SCHEDULER, Kind.CONTROL}
    reads_timestep: ClassVar = True

    def asks(self, site: Site) -> bool:
        """The units."""
        return site.path in self.seen.paths

    def decide(self, site: Site, step: Step) -> Decision | None:  # noqa: ARG002
        """Look at everything once."""
        return Look(self.seen)


@dataclass(frozen=True, slots=True)
class Look(Decision):
    """Run the unit and note the channels of what it puts out."""

    seen: Seen

    symbol: ClassVar[str] = "?"
    name: ClassVar[str] = "observed"

    def apply(self, call: Call, slot: Slot) -> Output:  # noqa: ARG002
        """Run and look."""
        output, widths = call.run(), []

        def note(tensor: Tensor) -> Tensor:
            widths.append(channels(tensor))
            return tensor

        map_tensors(output, note)
        self.seen.widths[call.site.path] = tuple(widths)
        self.seen.timesteps = tuple(float(t) for t in call.step.timesteps if t is not None)
        return output


@dataclass(eq=False)
class Lesson:
    """What learns, and the optimiser; whether it learns now; the errors since the last look."""

    weights: list[nn.Parameter]
    optimiser: torch.optim.Optimizer
    learns: bool = True
    errors: list[float] = field(default_factory=list)

    def validate(self, generate: Callable[[int], object], held_out: int) -> float:
        """The mean error of the held-out generations."""
        self.learns = False
        self.errors.clear()
        for number in range(held_out):
            generate(-1 - number)
        self.learns = True
        return sum(self.errors) / len(self.errors)


@dataclass(frozen=True)
class Teach(Method):
    """Compares the denoiser's output with that of the denoiser without its cache, and learns."""

    lesson: Lesson = field(repr=False)

    kinds: ClassVar = frozenset({Kind.MODEL})

    def decide(self, site: Site, step: Step) -> Decision | None:  # noqa: ARG002
        """At every step."""
        return Compare(self.lesson)


@dataclass(frozen=True, slots=True)
class Compare(Decision):
    """Run student and teacher on the same latents; one optimiser step."""

    lesson: Lesson

    symbol: ClassVar[str] = "!"
    name: ClassVar[str] = "learned from"

    def apply(self, call: Call, slot: Slot) -> Output:  # noqa: ARG002
        """The student's output."""
        lesson, alone = self.lesson, call.alone
        assert alone is not None
        target = first(alone(*call.args, **call.kwargs))  # without gradients, as pipelines run
        with torch.set_grad_enabled(lesson.learns):
            output = call.run()
            error = functional.mse_loss(first(output), target)
        lesson.errors.append(error.item())
        if error.requires_grad:
            error.backward(inputs=lesson.weights)  # type: ignore[no-untyped-call]  # the network's own get no gradient
            lesson.optimiser.step()
            lesson.optimiser.zero_grad()
        return map_tensors(output, Tensor.detach)


def first(output: Output) -> Tensor:
    """The sample in a denoiser's output."""
    return output if isinstance(output, Tensor) else output[0].float()
