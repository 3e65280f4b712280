"""Subjective Timescale Transformer (Wieser et al., 2025, https://arxiv.org/abs/2511.21408).

From what a layer made of the previous token a small transition network guesses how the layer will change this one. If
the change is large, or well explained, the layer runs for this token; else the token passes by. The change is known
only after the layer has run, so this score is a teacher; a student that sees the layer's input decides in decoding.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from ..ranges import one_of
from .criterion import Criterion, Surprising
from .router import Look, Router
from .routing import DecodeRouting, TrainingOutput
from .tokens import Tokens, mean_over


@dataclass(frozen=True, kw_only=True)
class STT(Surprising):
    """Subjective Timescale Transformer.

    Attributes:
        mode: "fixed", the best `capacity` of every text; "dynamic", every token whose gate reaches `g_threshold`.
        g_threshold: in (0, 1), of "dynamic".
        g_reg_weight: λ_g of "dynamic".
        g_target: the mean gate that λ_g pulls to; `None` pulls to 0, which collapses.
        output: what a layer puts out in training: selected tokens run again among themselves ("gated", the paper's),
            everything ("dense": only routers learn), or selected changes of the dense run ("masked").
        tpn_factor, tpn_weight: φ and λ of the transition network.
        teacher_grad: whether the dense run of the teacher is part of the gradient.

    For the others see `Surprising` and `Routing`. Decoding needs the student.
    """

    decode_routing: DecodeRouting = "student"
    beta_mode: Literal["learned", "scheduled"] = "scheduled"
    mode: Literal["fixed", "dynamic"] = "fixed"
    g_threshold: float = 0.75
    g_reg_weight: float = 0.01
    g_target: float | None = 0.5
    output: TrainingOutput = "gated"
    tpn_factor: float = 0.0625
    tpn_weight: float = 0.05
    teacher_grad: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("mode", self.mode, ("fixed", "dynamic"))
        one_of("output", self.output, ("gated", "dense", "masked"))
        if not 0 < self.g_threshold < 1 or not (self.g_target is None or 0 < self.g_target < 1):
            raise ValueError(f"g_threshold and g_target must be in (0, 1); got {self.g_threshold}, {self.g_target}")
        if self.mode == "dynamic" and self.capacity != 0.5:
            raise ValueError("mode='dynamic' has no budget: leave capacity alone, and set g_threshold and g_target.")
        if self.output == "masked" and self.kv_scope != "all":
            raise ValueError("output='masked' leaves keys and values of all tokens; set kv_scope='all'.")
        if not self.teacher_grad and self.output != "gated":
            raise ValueError(f"output={self.output!r} is the teacher's run, which teacher_grad=False leaves untrained.")

    @classmethod
    def paper(cls) -> Self:
        """As published: soft gate, mean squares, a linear student on two tokens."""
        return cls(gate="soft", ma_padding="replicate", student="linear2")

    @classmethod
    def recommended(cls) -> Self:
        """For converting pretrained models: training and decoding have the same gate."""
        return cls(always_run="first")

    @property
    def guess_factor(self) -> float:
        """φ."""
        return self.tpn_factor

    @property
    def weights(self) -> Mapping[str, float]:
        """λ of every loss."""
        shared = {"prior": self.tpn_weight, "bypass": self.tpn_weight, "student": self.student_weight}
        return shared | ({"gate": self.g_reg_weight} if self.mode == "dynamic" else {})

    @property
    def score_threshold(self) -> float | None:
        """u of the gate's threshold in "dynamic" mode."""
        return -math.log1p(-self.g_threshold) if self.mode == "dynamic" else None

    @property
    def training_output(self) -> TrainingOutput:
        """As `output`."""
        return self.output

    def router(self, width: int, eps: float) -> Router:
        """A new router."""
        return STTRouter(self, width, eps)


class STTRouter(Router):
    """Runs the block on all tokens, and weighs its changes."""

    runs_block: ClassVar[bool] = True

    def __init__(self, routing: STT, width: int, eps: float) -> None:
        super().__init__()
        self.routing = routing
        self.transition = routing.guess(width, eps)
        self.criterion = Criterion(routing)

    def look(self, tokens: Tokens, run: Callable[[], Tensor]) -> Look:
        """Score all tokens by the change that the block makes."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.routing.teacher_grad):
            dense = run()
        guess = self.transition(tokens.previous(dense, "dense"))
        look: Look = self.criterion(tokens, dense - tokens.stream, guess)
        return replace(look, dense=dense)

    def losses(self, look: Look, mask: Tensor, keep: Tensor | None) -> Mapping[str, Tensor]:
        """In "dynamic" mode, the distance of the mean gate from its target."""
        del mask
        if self.routing.mode == "fixed":
            return {}
        mean = mean_over(look.gate, keep)
        return {"gate": mean if self.routing.g_target is None else (mean - self.routing.g_target).square()}
