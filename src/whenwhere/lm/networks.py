"""The small networks beside a routed layer: guesses of a change, and students that guess a selection."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

Prior = Literal["ffn", "linear"]
Student = Literal["none", "mlp", "linear2"]
_INIT = 0.02  # standard deviation of new weights


def prior_width(width: int, factor: float) -> int:
    """i = ceil(d * factor), made even, at least 2."""
    inner = math.ceil(width * factor)
    return max(2, inner + inner % 2)


def drawn(module: nn.Module) -> None:
    """Draw the weight of a linear layer from N(0, 0.02²), and set its bias to 0."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=_INIT)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Guess(nn.Module):
    """A guess of a change from the stream: a narrow gated network, or one linear layer, behind a norm of its own.

    Without biases, so the guess for a zero input is exactly zero. With `variance` a head of its own gives the mean and
    the logarithm of the variance of every feature.
    """

    def __init__(self, width: int, factor: float, eps: float, kind: Prior = "ffn", variance: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=eps)
        inner = prior_width(width, factor)
        self.kind = kind
        if kind == "ffn":
            self.gate_proj = nn.Linear(width, inner, bias=False)
            self.up_proj = nn.Linear(width, inner, bias=False)
            self.down_proj = nn.Linear(inner, width, bias=False)
        else:
            self.proj = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 2 * width) if variance else None
        self.apply(drawn)

    def forward(self, stream: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> the change (B, T, D), and the logarithm of its variance or `None`."""
        features = self.norm(stream)
        if self.kind == "ffn":
            features = self.down_proj(silu(self.gate_proj(features)) * self.up_proj(features))
        else:
            features = self.proj(features)
        if self.head is None:
            return features, None
        mean, log_variance = self.head(features).chunk(2, dim=-1)
        return mean, log_variance


class Imitator(nn.Module):
    """A student: the logit that a token is selected, from what is known before the block runs. Inputs are detached.

    Args:
        width: d.
        kind: "mlp", a network of width max(16, d / 8); "linear2", one linear layer on this token and the one before.
        pair: whether the "mlp" sees the token before as well.
        capacity: the share that is selected; the first guess.
        eps: of the norm in front.
    """

    trained: Tensor

    def __init__(self, width: int, kind: Student, pair: bool, capacity: float, eps: float) -> None:
        super().__init__()
        self.pair = pair or kind == "linear2"
        entering = width * (1 + self.pair)
        self.norm = nn.RMSNorm(width, eps=eps)
        if kind == "linear2":
            self.net: nn.Module = nn.Linear(entering, 1, bias=False)
        else:
            middle = max(16, width // 8)
            self.net = nn.Sequential(nn.Linear(entering, middle, bias=False), nn.SiLU(), nn.Linear(middle, 1))
        self.register_buffer("trained", torch.zeros((), dtype=torch.bool))
        self.apply(drawn)
        if isinstance(self.net, nn.Sequential):
            share = min(max(capacity, 0.01), 0.99)
            nn.init.constant_(self.net[2].bias, math.log(share / (1 - share)))  # type: ignore[arg-type]

    def forward(self, stream: Tensor, before: Tensor) -> Tensor:
        """This token's and the previous token's stream, (B, T, D) -> logits (B, T), float32."""
        seen = self.norm(stream.detach())
        if self.pair:
            seen = torch.cat([seen, self.norm(before.detach())], -1)
        logit: Tensor = self.net(seen)
        return logit[..., 0].float()
