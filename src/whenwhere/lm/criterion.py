"""What SDT and STT share: the parameters of surprise, and the module that turns changes into scores."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..ranges import at_least, one_of
from .networks import Guess, Prior
from .router import Look
from .routing import Routing
from .surprise import (
    Criteria,
    Padding,
    gaussian_surprise,
    inverse_softplus,
    moving_average,
    static_surprise,
    weigh,
)
from .tokens import Tokens

Guessed = tuple[Tensor, Tensor | None]  # a change, and the logarithm of its variance
Kind = Literal["mse", "relative", "kl"]


@dataclass(frozen=True)
class BetaSchedule:
    """β over the steps of training: `start` until step `warmup`, then to `end` at the last step.

    Attributes:
        start, end: above 0. The authors end at 100, where gates saturate; 10 is advised.
        warmup: steps.
        shape: "linear", or half a "cosine".
    """

    start: float = 0.1
    end: float = 10.0
    warmup: int = 100
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        one_of("shape", self.shape, ("linear", "cosine"))
        at_least(0, warmup=self.warmup)
        if min(self.start, self.end) <= 0:
            raise ValueError(f"β must be above 0, got {self.start} ... {self.end}")

    def at(self, step: int, steps: int) -> float:
        """β at a step of so many."""
        share = min(max((step - self.warmup) / max(steps - self.warmup, 1), 0.0), 1.0)
        if self.shape == "cosine":
            share = (1 - float(torch.cos(torch.tensor(torch.pi * share)))) / 2
        return self.start + share * (self.end - self.start)


@dataclass(frozen=True, kw_only=True)
class Surprising(Routing):
    """The parameters of surprise.

    Attributes:
        surprise: "mse", the paper's mean squares; "relative", the same divided by their moving average, without scale;
            "kl", with a guessed variance.
        criteria: expected or unexpected change ("or"), or one of them alone ("ce", "cu").
        prior: the guess of the change: the paper's gated network ("ffn"), or one "linear" layer.
        bypass: what a skipped token gets: nothing ("identity", the paper's), or a guess of the layer's change from a
            second network ("prior"), trained on the selected tokens.
        ma_window: W, of the moving average.
        ma_padding: before W values exist; see `moving_average`.
        o_ce_init, m_cu_init: initial values, above 0, of the offset of CE and the factor of CU.
        beta_mode: whether the β are "learned", or "scheduled" by `set_step`.
        beta_ce_init, beta_cu_init: initial values, above 0, of learned β.
        beta_schedule: of scheduled ones.
    """

    surprise: Kind = "mse"
    criteria: Criteria = "or"
    prior: Prior = "ffn"
    bypass: Literal["identity", "prior"] = "identity"
    ma_window: int = 100
    ma_padding: Padding = "available"
    o_ce_init: float = 1.025
    m_cu_init: float = 1.1
    beta_mode: Literal["learned", "scheduled"] = "learned"
    beta_ce_init: float = 0.554
    beta_cu_init: float = 0.437
    beta_schedule: BetaSchedule = field(default_factory=BetaSchedule)

    gates: ClassVar[tuple[str, ...]] = ("soft", "ste", "hard")

    def __post_init__(self) -> None:
        if isinstance(self.beta_schedule, Mapping):  # from JSON
            object.__setattr__(self, "beta_schedule", BetaSchedule(**self.beta_schedule))
        super().__post_init__()
        one_of("surprise", self.surprise, ("mse", "relative", "kl"))
        one_of("criteria", self.criteria, ("or", "ce", "cu"))
        one_of("prior", self.prior, ("ffn", "linear"))
        one_of("bypass", self.bypass, ("identity", "prior"))
        one_of("ma_padding", self.ma_padding, ("replicate", "available"))
        one_of("beta_mode", self.beta_mode, ("learned", "scheduled"))
        at_least(1, ma_window=self.ma_window)
        for name in ("o_ce_init", "m_cu_init", "beta_ce_init", "beta_cu_init"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.guess_factor <= 0:
            raise ValueError(f"the width of the guess must be above 0, got a factor of {self.guess_factor}")
        if self.bypass == "prior" and not self.weights["bypass"]:
            raise ValueError("bypass='prior' is trained by the loss of the guess, whose weight is 0; give it one.")

    @property
    @abstractmethod
    def guess_factor(self) -> float:
        """φ, the width of a guess in units of the model's."""

    def guess(self, width: int, eps: float) -> Guess:
        """A new guess of a change."""
        return Guess(width, self.guess_factor, eps, self.prior, self.surprise == "kl")

    def bypass_network(self, width: int, eps: float) -> Guess | None:
        """A new guess of what a skipped layer would have added, if there shall be one."""
        return Guess(width, self.guess_factor, eps, self.prior) if self.bypass == "prior" else None


class Criterion(nn.Module):
    """From changes and their guesses to scores; its scalars stay positive by a softplus.

    The raw form of the paper diverges: the loss drives o_ce below 0, and its logarithm is not a number.
    """

    beta: Tensor

    def __init__(self, routing: Surprising) -> None:
        super().__init__()
        self.routing = routing
        self.raw_o_ce = nn.Parameter(torch.tensor(inverse_softplus(routing.o_ce_init)))
        self.raw_m_cu = nn.Parameter(torch.tensor(inverse_softplus(routing.m_cu_init)))
        if routing.beta_mode == "learned":
            self.raw_beta_ce = nn.Parameter(torch.tensor(inverse_softplus(routing.beta_ce_init)))
            self.raw_beta_cu = nn.Parameter(torch.tensor(inverse_softplus(routing.beta_cu_init)))
        else:
            self.register_buffer("beta", torch.tensor(routing.beta_schedule.start))

    def betas(self) -> tuple[Tensor, Tensor]:
        """β_ce and β_cu."""
        if self.routing.beta_mode == "scheduled":
            return self.beta.float(), self.beta.float()
        return softplus(self.raw_beta_ce.float()), softplus(self.raw_beta_cu.float())

    def forward(self, tokens: Tokens, change: Tensor, guess: Guessed, detach: bool = False) -> Look:
        """Score the tokens by their change and its guess, (B, T, D).

        The loss of the guess, named "prior", goes into the guess alone; the score into both, unless detached.
        """
        loss = tokens.mean(_left_over(change.detach(), guess))
        if detach:
            change, guess = change.detach(), (guess[0].detach(), None if guess[1] is None else guess[1].detach())
        nothing = torch.zeros_like(change)
        static = _left_over(change, (nothing, None if guess[1] is None else nothing))
        left = _left_over(change, guess)
        past = tokens.recall(static, "static", self.routing.ma_window - 1)
        average = moving_average(static.detach(), tokens.rank, self.routing.ma_window, self.routing.ma_padding, past)
        raw = {"static": static, "change": left}
        if self.routing.surprise == "relative":
            scale = average + 1e-8
            static, left, average = static / scale, left / scale, torch.ones_like(average)
        o_ce, m_cu = softplus(self.raw_o_ce.float()), softplus(self.raw_m_cu.float())
        found = weigh(static, left, average, o_ce, m_cu, self.betas(), self.routing.criteria)
        details = raw | {"expected": found.expected, "unexpected": found.unexpected}
        return Look(found.score, found.gate, {"prior": loss}, {k: v.detach() for k, v in details.items()})


def _left_over(change: Tensor, guess: Guessed) -> Tensor:
    """What a guess leaves of a change, (B, T, D) -> (B, T): a mean square, or a divergence if a variance is guessed."""
    mean, log_variance = guess
    return static_surprise(change - mean) if log_variance is None else gaussian_surprise(change, mean, log_variance)
