"""Gates: with which weight the change that a block computed is added to the stream."""

from typing import Literal, get_args

import torch
from torch import Tensor

Gate = Literal["raw", "sigmoid", "soft", "ste", "hard"]
GATES: tuple[str, ...] = get_args(Gate)


def weight(gate: Gate, soft: Tensor) -> Tensor:
    """The weight of every token's change, of the shape of `soft`.

    "raw", "sigmoid" and "soft" are `soft` itself, as the router computed it. "ste" is 1 with the gradient of `soft`
    (the straight-through estimator), and "hard" is 1.
    """
    if gate == "hard":
        return torch.ones_like(soft)
    return 1 + (soft - soft.detach()) if gate == "ste" else soft


def blend(before: Tensor, after: Tensor, gate: Tensor) -> Tensor:
    """before + gate (after - before), exactly `after` where the gate is 1: (B, k, D) twice and (B, k) -> (B, k, D)."""
    return torch.lerp(before, after, gate[..., None].to(before.dtype))
