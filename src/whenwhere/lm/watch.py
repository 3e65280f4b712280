"""How well routers and students do: measured on the last call, and watched in every call where that is asked for."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .call import Note
from .within import find

ENOUGH = 200  # tokens from which on a share of 1 % can be told from none


@dataclass(frozen=True, slots=True)
class Measured:
    """What a router did in a call, and how well its student imitated it.

    A selection of half of the tokens is guessed right half of the time: compare `accuracy` with `trivial`. Figures of
    the student are `None` where it was not asked, and `auc` also where all or no tokens were selected.

    Attributes:
        realised: the share of tokens that were processed.
        score_mean, score_deviation: of the router's scores; `None` where it was not asked.
        gate_mean: of the soft gate.
        tied: the share of tokens whose score equals the lowest selected one; more than one token a text is a tie.
        accuracy: of the student's sign.
        trivial: the accuracy of always giving the more frequent answer.
        precision: of the tokens that the student takes, the share that was selected; 1 where it takes none.
        recall: of the selected tokens, the share that the student takes; 1 where none was.
        auc: the probability that a selected token has a higher logit than another one.
    """

    realised: float
    score_mean: float | None
    score_deviation: float | None
    gate_mean: float | None
    tied: float | None
    accuracy: float | None
    trivial: float
    precision: float | None
    recall: float | None
    auc: float | None


def router_metrics(model: nn.Module) -> dict[int, Measured]:
    """What routers and students did in the last call, by layer; waits for the device.

    Students are asked in training, and under `policy="topk"` or `"student"`.

    Raises:
        ValueError: there was no call.
    """
    routed = find(model)
    if routed.call is None:
        raise ValueError("router_metrics needs a forward call before; call the model on a text.")
    return {index: _measure(note, routed.call.keep) for index, note in routed.notes.items()}


@torch.no_grad()
def _measure(note: Note, keep: Tensor | None) -> Measured:
    kept = torch.ones_like(note.mask) if keep is None else keep
    mask = note.mask[kept]
    realised = mask.double().mean().item()
    score = None if note.score is None else note.score[kept]
    tied = None
    if note.score is not None and mask.any():
        border = note.score.masked_fill(~note.mask, float("inf")).amin(1, keepdim=True)
        tied = (note.score == border)[kept].double().mean().item()
    found: tuple[float | None, ...] = (None,) * 4
    if note.student is not None:
        logits = note.student[kept]
        taken = logits >= 0
        both = (taken & mask).sum().item()
        accuracy = (taken == mask).double().mean().item()
        precision = both / taken.sum().item() if taken.any() else 1.0
        found = (accuracy, precision, both / mask.sum().item() if mask.any() else 1.0, area(logits, mask))
    return Measured(
        realised,
        None if score is None else score.mean().item(),
        None if score is None else score.std(correction=0).item(),
        None if note.gate is None else note.gate[kept].mean().item(),
        tied,
        found[0],
        max(realised, 1 - realised),
        *found[1:],
    )


def area(scores: Tensor, positive: Tensor) -> float | None:
    """The area under the receiver operating curve, (N,) and (N,): ties count half. `None` if there is one kind only."""
    high, low = scores[positive].double(), scores[~positive].double()
    if not len(high) or not len(low):
        return None
    order = low.sort().values
    below, upto = (torch.searchsorted(order, high, right=right) for right in (False, True))
    return ((below + upto).double().mean() / 2 / len(low)).item()


@contextmanager
def watched(model: nn.Module) -> Iterator[None]:
    """Within this context every call is looked at, which waits for the device and cannot be compiled.

    Warns (RuntimeWarning) where a layer processes less than 1 % or more than 99 % of at least 200 tokens, though nobody
    asked for all or nothing: its router has collapsed.

    Raises:
        FloatingPointError: a score is not a number, or without bound.
    """
    handle = find(model).register_forward_hook(_look)
    try:
        yield
    finally:
        handle.remove()


def _look(routed: Any, *_: Any) -> None:
    call = routed.call
    for index, note in call.notes.items():
        for what, values in (("the router", note.score), ("the student", note.student)):
            if values is not None and not values.isfinite().all():
                raise FloatingPointError(
                    f"layer {index}: scores of {what} are not finite; lower the learning rate, or train in more bits."
                )
        if note.mask.numel() < ENOUGH or call.policy in ("all", "none") or index in call.knob.selection:
            continue
        share = routed.realised[index]
        if not 0.01 <= share <= 0.99 and routed.model.layers[index].capacity < 1:
            warnings.warn(
                f"layer {index} processes {share:.1%} of the tokens: its router has collapsed. Calibrate anew; in "
                "training look at g_target, β and the learning rate of the routers.",
                RuntimeWarning,
                stacklevel=2,
            )
