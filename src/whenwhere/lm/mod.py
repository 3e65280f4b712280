"""Mixture-of-Depths (Raposo et al., 2024, https://arxiv.org/abs/2404.02258).

Some layers have a fixed budget of tokens. A learned linear score ranks the tokens of a sequence; the best go through
the layer, self-attention and MLP, and the others pass by on the residual path.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from .gates import Gate
from .router import Look, Router
from .routing import Routing
from .tokens import Tokens, mean_over


@dataclass(frozen=True, kw_only=True)
class MoD(Routing):
    """Mixture-of-Depths.

    Attributes:
        aux_weight: λ_aux of the loss that makes "score above 0" predict the selection, so that the router can decide
            without the rest of the text.
        z_weight: λ_z of the mean square of the scores; not in the paper.

    For the others see `Routing`.
    """

    aux_weight: float = 0.01
    z_weight: float = 1e-4

    gates: ClassVar[tuple[str, ...]] = ("raw", "sigmoid", "ste", "hard")

    @classmethod
    def paper(cls) -> Self:
        """The paper's best: an eighth of the tokens, gated by the raw score, decided by the router's own sign."""
        return cls(capacity=0.125, gate="raw", z_weight=0.0, student="none")

    @classmethod
    def recommended(cls) -> Self:
        """For converting pretrained models."""
        return cls(always_run="first")

    @property
    def weights(self) -> Mapping[str, float]:
        """λ of every loss."""
        return {"aux": self.aux_weight, "z": self.z_weight, "student": self.student_weight}

    def router(self, width: int, eps: float) -> Router:
        """A new router."""
        del eps
        return MoDRouter(width, self.gate)


class MoDRouter(Router):
    """r = x w, the score and, as it is or through a sigmoid, the gate."""

    def __init__(self, width: int, gate: Gate) -> None:
        super().__init__()
        self.gate = gate
        # zeros would make every score tie
        self.weight = nn.Parameter(torch.randn(width) * 0.02)

    def look(self, tokens: Tokens, run: Callable[[], Tensor]) -> Look:
        """Score all tokens; the block is not needed."""
        del run
        with torch.autocast(tokens.stream.device.type, enabled=False):  # in fewer bits many scores would tie
            score = tokens.stream.float() @ self.weight.float()
        return Look(score, score if self.gate == "raw" else score.sigmoid())

    def losses(self, look: Look, mask: Tensor, keep: Tensor | None) -> Mapping[str, Tensor]:
        """The auxiliary loss and the square of the scores."""
        missed = binary_cross_entropy_with_logits(look.score, mask.float(), reduction="none")
        return {"aux": mean_over(missed, keep), "z": mean_over(look.score.square(), keep)}
