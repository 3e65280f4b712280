"""Subjective Depth Transformer (Wieser et al., 2025, https://arxiv.org/abs/2511.21408).

Layers come in pairs. The first changes every token; a small network guesses that change in advance. Tokens whose
change was large, or was explained by the guess, go through the second layer; the others skip it. The score is known
before the second layer runs, and it looks back only: this method decodes with its own score.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Self

from torch import Tensor

from .criterion import Criterion, Surprising
from .networks import Student
from .router import Look, Router
from .tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class SDT(Surprising):
    """Subjective Depth Transformer.

    Attributes:
        prior_factor: φ, the width of the guess in units of the model's.
        prior_weight: λ_prior.
        detach_prior_input: whether the loss of the guess stays out of the layers before.
        detach_score: whether the gate's gradient goes into the four scalars of the criterion alone.

    For the others see `Surprising` and `Routing`.
    """

    student: Student = "none"
    prior_factor: float = 0.0625
    prior_weight: float = 0.05
    detach_prior_input: bool = False
    detach_score: bool = False

    @classmethod
    def paper(cls) -> Self:
        """As published: soft gate, mean squares, learned β."""
        return cls(gate="soft", ma_padding="replicate", student="mlp")

    @classmethod
    def recommended(cls) -> Self:
        """For converting pretrained models: scores without scale, whose thresholds hold their budget."""
        return cls(surprise="relative", always_run="first")

    def layers(self, count: int) -> tuple[int, ...]:
        """The second layer of every pair; the layer before a routed one is dense.

        Raises:
            ValueError: as `Routing.layers`, or two routed layers follow one another.
        """
        chosen = super().layers(count)
        if any(b - a == 1 for a, b in pairwise(chosen)):
            raise ValueError(f"SDT needs a dense layer before every routed one, whose change it weighs; got {chosen}.")
        return chosen

    @property
    def guess_factor(self) -> float:
        """φ."""
        return self.prior_factor

    @property
    def weights(self) -> Mapping[str, float]:
        """λ of every loss."""
        return {"prior": self.prior_weight, "bypass": self.prior_weight, "student": self.student_weight}

    def router(self, width: int, eps: float) -> Router:
        """A new router."""
        return SDTRouter(self, width, eps)


class SDTRouter(Router):
    """Weighs the change of the layer before, whose input and output it sees."""

    looks_back: ClassVar[bool] = True

    def __init__(self, routing: SDT, width: int, eps: float) -> None:
        super().__init__()
        self.routing = routing
        self.prior = routing.guess(width, eps)
        self.criterion = Criterion(routing)

    def look(self, tokens: Tokens, run: Callable[[], Tensor]) -> Look:
        """Score all tokens; the block is not needed."""
        del run
        before = tokens.earlier
        guess = self.prior(before.detach() if self.routing.detach_prior_input else before)
        look: Look = self.criterion(tokens, tokens.stream - before, guess, self.routing.detach_score)
        return look
