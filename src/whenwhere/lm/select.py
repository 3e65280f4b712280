"""Selection: which tokens of every sequence are processed, in the order of their positions.

A sequence selects by itself: what its neighbours in the batch do never matters. Where sequences select different
numbers of tokens, places are left over and marked as invalid.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

_DENOMINATOR = 1024  # floor(0.29 * 100) is 28 in floating point; fractions with small denominators are exact


@dataclass(frozen=True, slots=True)
class Chosen:
    """Selected tokens.

    Attributes:
        index: (B, k), positions in rising order; those of invalid places differ from the others.
        valid: (B, k), or `None` if every place is.
        mask: (B, T), whether a token was selected.
    """

    index: Tensor
    valid: Tensor | None
    mask: Tensor

    @property
    def places(self) -> int:
        """k."""
        return self.index.shape[1]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # fractions cannot be traced
def as_fraction(capacity: float) -> tuple[int, int]:
    """The capacity as a fraction: numerator and denominator, which is at most 1024.

    Raises:
        ValueError: it is not in (0, 1].
    """
    if not 0 < capacity <= 1:
        raise ValueError(f"capacity must be in (0, 1], got {capacity!r}: the share of tokens a routed layer processes.")
    share = max(Fraction(capacity).limit_denominator(_DENOMINATOR), Fraction(1, _DENOMINATOR))
    return share.numerator, share.denominator


def budget(capacity: float, tokens: int) -> int:
    """k = max(1, floor(capacity * tokens)), exactly."""
    share, of = as_fraction(capacity)
    places: int = max(1, tokens * share // of)
    return places


def top_k(score: Tensor, capacity: float, keep: Tensor | None = None, always: Tensor | None = None) -> Chosen:
    """The k best of every sequence; among equals the earliest win.

    Args:
        score: (B, T).
        capacity: in (0, 1]; k = max(1, floor(capacity * n)) of a sequence of n tokens that are no padding.
        keep: (B, T), False at padding, which is never selected; or `None`.
        always: (B, T), True where a token is selected before all others; they count in k.
    """
    tokens = score.shape[1]
    places = budget(capacity, tokens)
    if always is not None:
        score = score.masked_fill(always, math.inf)
    if keep is not None:
        score = score.masked_fill(~keep, -math.inf)
    order = score.sort(dim=1, descending=True, stable=True).indices[:, :places]
    if keep is None:
        return Chosen(order.sort(dim=1).values, None, _mark(order, None, tokens))
    share, of = as_fraction(capacity)
    counts = (keep.sum(1) * share // of).clamp(min=1)
    within = torch.arange(places, device=score.device) < counts[:, None]
    valid = within & keep.gather(1, order)
    # Invalid places are sorted behind the others.
    behind = (order + tokens * ~valid).sort(dim=1).values
    return Chosen(behind % tokens, behind < tokens, _mark(order, valid, tokens))


def of_mask(mask: Tensor) -> Chosen:
    """The tokens of a mask (B, T); as many places as the fullest sequence needs, which waits for the device."""
    counts = mask.sum(1).tolist()
    index = (~mask).sort(dim=1, stable=True).indices[:, : max(counts)]
    even = len(set(counts)) == 1
    return Chosen(index, None if even else mask.gather(1, index), mask)


def steered(
    over: Tensor, rate: float, capacity: float, keep: Tensor | None, always: Tensor | None, drift: Tensor
) -> tuple[Tensor, Tensor]:
    """Select by thresholds that follow a budget: θ <- θ + η (run - γ) after every token, for every sequence by itself.

    Args:
        over: (B, T), the score above the threshold that the calibration gave.
        rate, capacity: η and γ.
        keep: (B, T), False at padding, which is neither selected nor counted; or `None`.
        always: (B, T), True where a token is selected anyway; or `None`.
        drift: (B,), how far the thresholds had moved before.

    Returns:
        the selection (B, T), and how far the thresholds have moved (B,).
    """
    kept = torch.ones_like(over, dtype=torch.bool) if keep is None else keep
    chosen = []
    for place in range(over.shape[1]):
        run = over[:, place] >= drift
        run = (run if always is None else run | always[:, place]) & kept[:, place]
        drift = drift + rate * (run.float() - capacity) * kept[:, place]
        chosen.append(run)
    return torch.stack(chosen, 1), drift


def in_place(mask: Tensor) -> Chosen:
    """The tokens of a mask (B, T) with a place for every token: nothing depends on the data, and nothing is saved."""
    index = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return Chosen(index, mask, mask)


def everything(score: Tensor) -> Chosen:
    """All tokens, without a place left over."""
    chosen = in_place(torch.ones_like(score, dtype=torch.bool))
    return Chosen(chosen.index, None, chosen.mask)


def _mark(order: Tensor, valid: Tensor | None, tokens: int) -> Tensor:
    """Which of so many tokens are among those of valid places."""
    marks = torch.ones_like(order, dtype=torch.bool) if valid is None else valid
    return marks.new_zeros(order.shape[0], tokens).scatter(1, order, marks)
