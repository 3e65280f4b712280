"""Perplexity on a text, as decoding would have it, with what was computed for it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .call import Knob
from .causal import RoutedCausalLM
from .within import turned

Choose = Callable[[Tensor], Knob]


@dataclass(frozen=True, slots=True)
class Score:
    """How well a model guesses a text.

    Attributes:
        nats: the mean loss of a guessed token.
        tokens: that were guessed.
        realised: the mean share of tokens that routed layers processed; 1 for a dense model.
        seconds: of wall clock.
    """

    nats: float
    tokens: int
    realised: float
    seconds: float

    @property
    def perplexity(self) -> float:
        """e to the mean loss; infinite where that is no number."""
        return math.exp(self.nats) if self.nats < 700 else math.inf


@torch.no_grad()
def score(model: nn.Module, ids: Tensor, context: int = 512, rows: int = 4, knob: Knob | Choose | None = None) -> Score:
    """Score a text in windows that do not overlap, each without what came before.

    Args:
        model: routed or dense; runs in evaluation mode.
        ids: (N,), token numbers; what is left over behind the last whole window is not scored.
        context: tokens of a window.
        rows: windows that run at once.
        knob: the trade of speed against quality, or a function of a batch (B, T) that gives it.

    Raises:
        ValueError: the text is shorter than two tokens, or a dense model is given a knob.
    """
    context = min(context, len(ids))
    if context < 2:
        raise ValueError(f"a text needs at least two tokens to be scored, and so does its context; got {context}.")
    routed = model if isinstance(model, RoutedCausalLM) else None
    if routed is None and knob is not None:
        raise ValueError(f"{type(model).__name__} is not routed, and has no knob; see whenwhere.lm.route.")
    windows = ids[: len(ids) // context * context].view(-1, context)
    training, began = model.training, time.perf_counter()
    model.eval()
    total, shares = 0.0, 0.0
    try:
        for batch in torch.split(windows, rows):
            loss, share = _score(model, routed, batch, knob(batch) if callable(knob) else knob)
            total, shares = total + loss * len(batch), shares + share * len(batch)
    finally:
        model.train(training)
    seconds = time.perf_counter() - began
    return Score(total / len(windows), len(windows) * (context - 1), shares / len(windows), seconds)


def _score(model: Any, routed: Any, batch: Tensor, knob: Knob | None) -> tuple[float, float]:
    """Mean loss of a batch, and the mean share of tokens that routed layers processed."""
    batch = batch.to(model.device)
    if routed is None:
        return float(model(batch, labels=batch, use_cache=False).loss), 1.0
    with turned(routed, knob or routed.knob):
        loss = float(model(batch, labels=batch, use_cache=False).loss)
    found = routed.realised
    return loss, sum(found.values()) / len(found)
