"""Which tokens a routed layer processes in a call, and by which threshold."""

from typing import Any

import torch
from torch import Tensor

from .cache import RoutedLayer
from .call import Call, of_layer
from .router import Look
from .select import Chosen, everything, in_place, of_mask, steered, top_k
from .tokens import Tokens

QUANTILES = 101


def choose(
    layer: Any, call: Call, look: Look | None, logits: Tensor | None, tokens: Tokens, memory: RoutedLayer | None
) -> Chosen:
    """The tokens that a routed layer processes in a call: by what the knob says, the router's scores or the student's.

    Args:
        layer: a `Routed`.
        call: this one.
        look: what the router saw, where it was asked.
        logits: (B, T), the student's, where it was asked.
        tokens: in front of the layer.
        memory: its keys and values, which may have no room for more.
    """
    shape, keep = tokens.stream[..., 0], tokens.keep
    always = layer.routing.always(tokens)
    given = call.knob.selection.get(layer.index)
    dynamic = layer.routing.score_threshold
    if given is not None:
        mask = given.to(device=shape.device, dtype=torch.bool).expand_as(shape)
    elif call.policy == "topk" and dynamic is None:
        assert look is not None
        found = top_k(look.score, of_layer(call.knob.capacity, layer.index) or layer.capacity, keep, always)
        room = found.mask if memory is None else memory.slots.room(found.mask)
        return found if room is found.mask else of_mask(room)
    elif call.policy in ("all", "none"):
        mask = torch.full_like(shape, call.policy == "all", dtype=torch.bool)
    else:
        scores = logits if call.policy == "student" else None if look is None else look.score
        assert scores is not None
        border = threshold(layer, call) if call.policy != "topk" or dynamic is None else dynamic
        if call.knob.steer and not call.training:
            mask = _steered(layer, call, scores - border, always, tokens)
        else:
            mask = scores >= border
            mask = mask if always is None else mask | always
    if call.policy == "all" and keep is None and given is None and not layer.routing.cache_slots:
        return everything(mask)
    mask = mask if keep is None else mask & keep
    mask = mask if memory is None else memory.slots.room(mask)
    return in_place(mask) if call.training or layer.routing.decode_compute == "masked" else of_mask(mask)


def _steered(layer: Any, call: Call, over: Tensor, always: Tensor | None, tokens: Tokens) -> Tensor:
    """Which tokens reach thresholds that follow the budget; how far they moved is remembered."""
    memory = {} if tokens.memory is None else tokens.memory
    drift = memory.get("drift", torch.zeros_like(over[:, 0]))
    capacity = of_layer(call.knob.capacity, layer.index) or layer.capacity
    mask, memory["drift"] = steered(over, call.knob.steer, capacity, tokens.keep, always, drift)
    return mask


def threshold(layer: Any, call: Call) -> Tensor | float:
    """θ in this call.

    Raises:
        ValueError: nothing tells which.
    """
    asked = of_layer(call.knob.threshold, layer.index)
    if asked is not None:
        return asked
    capacity = of_layer(call.knob.capacity, layer.index)
    if capacity == 1 or (capacity is None and layer.capacity == 1):
        return float("-inf")
    student = call.policy == "student"
    if call.calibrated:
        return quantile(layer.student_quantiles if student else layer.quantiles, 1 - (capacity or layer.capacity))
    # Trained without the rest of the text in view, 0 is the border of the selection.
    if capacity is None and (student or layer.routing.weights.get("aux")):
        return 0.0
    raise ValueError(
        f"layer {layer.index} has no quantiles for a threshold; run whenwhere.lm.calibrate(model, batches), "
        "or score whole texts with policy='topk', which is not causal."
    )


def quantile(table: Tensor, share: float) -> Tensor:
    """The value below which a share of the scores lies, between the entries of a table of 0 %, 1 %, ... 100 %."""
    place = min(max(share, 0.0), 1.0) * (QUANTILES - 1)
    low = min(int(place), QUANTILES - 2)
    return torch.lerp(table[low].float(), table[low + 1].float(), place - low)
