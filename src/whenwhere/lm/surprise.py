"""Surprise: how much a representation changed, against "nothing changes" and against a guess of the change.

The shared mathematics of the Subjective Depth and Timescale Transformers (Wieser et al., 2025,
https://arxiv.org/abs/2511.21408). For Gaussians of equal, isotropic covariance the Bayesian surprise is the squared
distance of their means up to a factor, so mean squares stand for surprise. Everything is computed in float32.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

Padding = Literal["replicate", "available"]
Criteria = Literal["or", "ce", "cu"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the two criteria say about every token; all (B, T), float32.

    Attributes:
        static: D_st, the mean square of the change.
        change: D_ch, the same of what the guess left unexplained.
        expected: CE = D_st - D_ch + log o_ce.
        unexpected: CU = D_st - m_cu * MA(D_st).
        score: u = -log(1 - g), in [0, inf): the order of g without its saturation.
    """

    static: Tensor
    change: Tensor
    expected: Tensor
    unexpected: Tensor
    score: Tensor

    @property
    def gate(self) -> Tensor:
        """g = S_CE + S_CU - S_CE S_CU in [0, 1], the probabilistic OR of σ(β_ce CE) and σ(β_cu CU)."""
        return -torch.expm1(-self.score)


def static_surprise(change: Tensor) -> Tensor:
    """D_st, the mean square over features: (B, T, D) -> (B, T)."""
    return change.float().square().mean(-1)


def gaussian_surprise(change: Tensor, mean: Tensor, log_variance: Tensor, floor: float = 1.0) -> Tensor:
    """KL from N(change, floor I) to N(mean, diag exp(log_variance)), divided by D: (B, T, D) -> (B, T).

    With mean 0 and variance `floor` it is D_st / (2 floor): both hypotheses are measured in the same unit.
    """
    distance = (change.float() - mean.float()).square()
    log_variance = log_variance.float()
    return 0.5 * (log_variance - math.log(floor) + (distance + floor) * torch.exp(-log_variance) - 1).mean(-1)


def moving_average(
    values: Tensor, rank: Tensor, window: int, padding: Padding = "available", past: Tensor | None = None
) -> Tensor:
    """Causal mean of the last `window` values of every document, the present one included.

    Args:
        values: (B, T), float.
        rank: (B, T), how many tokens of the same document come before; so averages start anew with a document, and
            padding in front of a text is left out.
        window: W, at least 1.
        padding: before W values exist, their mean ("available"), or the first value in the places of the missing ones.
        past: (B, P), the values before these, at least the last W - 1 if there were as many.
    """
    values = values.double()
    whole = values if past is None else torch.cat([past.double(), values], 1)
    behind = whole.shape[1] - values.shape[1]
    place = behind + torch.arange(values.shape[1], device=values.device).expand_as(values)  # (B, T), within `whole`
    count = torch.minimum((rank + 1).clamp(1, window), place + 1)
    sums = torch.nn.functional.pad(whole.cumsum(1), (1, 0))
    total = sums.gather(1, place + 1) - sums.gather(1, place + 1 - count)
    if padding == "available":
        return (total / count).float()
    first = whole.gather(1, place + 1 - count)  # the document's first value, wherever values are missing
    return ((total + (window - count) * first) / window).float()


def weigh(
    static: Tensor,
    change: Tensor,
    average: Tensor,
    offset: Tensor,
    factor: Tensor,
    beta: tuple[Tensor, Tensor],
    criteria: Criteria = "or",
) -> Evidence:
    """The two criteria and their union.

    Args:
        static, change, average: D_st, D_ch and the moving average of D_st, (B, T).
        offset, factor: o_ce and m_cu, positive scalars.
        beta: the inverse temperatures of CE and CU, positive scalars.
        criteria: both, or one of them alone.
    """
    expected = static - change + torch.log(offset)
    unexpected = static - factor * average
    terms = {"ce": softplus(beta[0] * expected), "cu": softplus(beta[1] * unexpected)}
    score = terms["ce"] + terms["cu"] if criteria == "or" else terms[criteria]
    return Evidence(static, change, expected, unexpected, score)


def inverse_softplus(value: float) -> float:
    """The x with softplus(x) = value > 0."""
    return value + math.log(-math.expm1(-value))
