"""Calibration: which threshold of a score selects which share of the tokens, measured on texts."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .choice import QUANTILES
from .within import find


def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor]) -> dict[int, Tensor]:
    """Measure the scores of routers and students while the best tokens of whole texts are selected.

    101 quantiles by layer become part of the model and of its checkpoints; a capacity is turned into a threshold by
    them. Calibrate anew after training.

    Args:
        model: a routed model.
        batches: token numbers (B, T), or arguments of the model such as `input_ids` and `attention_mask`.

    Returns:
        by layer, the 101 quantiles of the router's scores.

    Raises:
        ValueError: there are no batches, or scores are not finite.
    """
    routed = find(model)
    scores: dict[int, list[Tensor]] = {layer.index: [] for layer in routed.routed}
    logits: dict[int, list[Tensor]] = {layer.index: [] for layer in routed.routed}
    training = routed.training
    routed.eval()
    try:
        for batch in batches:
            _measure(routed, batch, scores, logits)
    finally:
        routed.train(training)
    for layer in routed.routed:
        layer.quantiles.copy_(_table(scores[layer.index], layer.index))
        if layer.student is not None:
            layer.student_quantiles.copy_(_table(logits[layer.index], layer.index))
    routed.config.routing_calibrated = True
    return {layer.index: layer.quantiles.clone() for layer in routed.routed}


@torch.no_grad()
def _measure(routed: Any, batch: Any, scores: dict[int, list[Tensor]], logits: dict[int, list[Tensor]]) -> None:
    given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    given.pop("labels", None)
    device = routed.device
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
    routed(**given, use_cache=False, policy="topk", logits_to_keep=1)
    keep = routed.call.keep
    for index, note in routed.notes.items():
        scores[index].append(_flat(note.score, keep))
        if note.student is not None:
            logits[index].append(_flat(note.student, keep))


def _flat(values: Tensor, keep: Tensor | None) -> Tensor:
    return (values.flatten() if keep is None else values[keep]).float().cpu()


def _table(found: list[Tensor], layer: int) -> Tensor:
    if not found:
        raise ValueError("calibrate needs at least one batch; found none.")
    values = torch.cat(found).sort().values
    if not values.isfinite().all():
        raise ValueError(f"layer {layer} has scores that are not finite; is the model trained in too few bits?")
    # torch.quantile refuses more than 16 million values.
    place = torch.linspace(0, len(values) - 1, QUANTILES, dtype=torch.float64)
    low = place.floor().long()
    high = (low + 1).clamp(max=len(values) - 1)
    return torch.lerp(values[low].double(), values[high].double(), place - low).float()
