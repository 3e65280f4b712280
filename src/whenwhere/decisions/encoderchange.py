"""Measuring how much what the encoder puts out changes from step to step, by which key steps can be chosen.

Equation 2 of Faster Diffusion (https://arxiv.org/abs/2312.09608, appendix G): the squared norm of the change, divided
by channels and positions, for every resolution. The latents are those of the plain pipeline, bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ..clock import Step
from ..decision import Call, Decision, Output, Slot, map_tensors
from ..method import Method, Setting
from ..site import Kind, Side, Site


@dataclass
class EncoderNotes:
    """What is written down while measuring.

    Attributes:
        steps: of every run.
        sums, tensors: by positions of a feature and step, the changes of all tensors together, and how many these were.
    """

    steps: list[int] = field(default_factory=list)
    sums: dict[tuple[int, int], float] = field(default_factory=dict)
    tensors: dict[tuple[int, int], int] = field(default_factory=dict)

    def changes(self) -> dict[int, tuple[float, ...]]:
        """The mean change from step s - 1 to step s at every resolution, by its number of positions; 0 at first.

        Raises:
            ValueError: no run of at least two steps, or runs of different lengths or interrupted ones.
        """
        resolutions, steps = sorted({positions for positions, _ in self.sums}, reverse=True), set(self.steps)
        counts = [[self.tensors.get((p, s), 0) for s in range(1, min(steps))] for p in resolutions] if steps else []
        if len(steps) != 1 or not counts or any(len(set(row)) != 1 for row in counts):
            found = ", ".join(map(str, sorted(steps))) or "none"
            raise ValueError(
                f"key steps are chosen by whole runs of one number of steps, at least two; found {found}, or one that "
                "was interrupted."
            )
        return {p: (0.0, *(self.sums[p, s] / self.tensors[p, s] for s in range(1, self.steps[0]))) for p in resolutions}


@dataclass(frozen=True)
class EncoderRecorder(Method):
    """Computes everything, and notes how much the encoder's outputs changed. It carries a notebook."""

    notes: EncoderNotes = field(repr=False)

    kinds: ClassVar = frozenset({Kind.STEM, Kind.STAGE, Kind.BLOCK})

    def asks(self, site: Site) -> bool:
        """What hands features to the decoder: stem, stages and middle; blocks where these are the stages."""
        return site.kind in self.kinds and site.side in (Side.ENCODER, Side.MIDDLE)

    def check(self, sites: Sequence[Site], model: str) -> None:
        """There must be an encoder."""
        if not any(map(self.asks, sites)):
            raise ValueError(f"{model} has no skip connections that would tell an encoder, whose changes are measured.")

    def review(self, setting: Setting) -> None:
        """Note the number of steps."""
        self.notes.steps.append(setting.steps)

    def decide(self, site: Site, step: Step) -> Decision | None:  # noqa: ARG002
        """Measure, at every step."""
        return MeasureEncoder(self.notes)


@dataclass(frozen=True, slots=True)
class MeasureEncoder(Decision):
    """Run the site and note how much what it hands on changed since the step before."""

    notes: EncoderNotes

    symbol: ClassVar[str] = "?"
    name: ClassVar[str] = "measured"

    def apply(self, call: Call, slot: Slot) -> Output:
        """Run, compare, remember."""
        output = call.run()
        present = _features(output)
        for old, new in zip([] if slot.empty else slot.get(call), present, strict=False):
            key = new[0, 0].numel() if new.ndim > 3 else new.shape[1], call.step.index
            self.notes.sums[key] = self.notes.sums.get(key, 0.0) + float((new.float() - old.float()).square().mean())
            self.notes.tensors[key] = self.notes.tensors.get(key, 0) + 1
        slot.put(present, call)
        return output


def _features(output: Output) -> list[Tensor]:
    """The features in what a site returns: (R, d, H, W), or (R, N, d). A stage hands its last one on twice."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        if not any(tensor is other for other in found):
            found.append(tensor)
        return tensor

    map_tensors(output, note)
    return found
