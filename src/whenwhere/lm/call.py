"""One forward call of a routed model: how tokens are selected in it, and what came of that."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..ranges import one_of

Policy = Literal["auto", "topk", "router", "student", "all", "none"]
PerLayer = float | Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Knob:
    """The trade of speed against quality at run time. Whatever is not given is as it was trained.

    Attributes:
        policy: who selects: the best of a whole text ("topk", not causal), the "router" or the "student" by a
            threshold, everything ("all") or nothing ("none"); "auto" is "topk" in training, else what `Routing` says.
        capacity: the share of tokens, in (0, 1]; for all routed layers, or by layer.
        threshold: of the scores, or of the student's logits, in place of a capacity.
        selection: by layer, the tokens (B, T) that shall run, whatever anybody says.
        steer: η, at least 0, in units of the score. After every token a sequence moves its own threshold by
            η (1 - γ) if the token ran, else by -η γ, so that the share of tokens that run tends to the capacity.

    Raises:
        ValueError: something is out of range, or both capacity and threshold are given, or both threshold and steer.
    """

    policy: Policy = "auto"
    capacity: PerLayer | None = None
    threshold: PerLayer | None = None
    selection: Mapping[int, Tensor] = field(default_factory=dict)
    steer: float = 0.0

    def __post_init__(self) -> None:
        one_of("policy", self.policy, ("auto", "topk", "router", "student", "all", "none"))
        if self.capacity is not None and self.threshold is not None:
            raise ValueError("a threshold is a capacity in other units: give one of both.")
        if self.steer < 0:
            raise ValueError(f"steer must be at least 0, got {self.steer}")
        if self.steer and self.threshold is not None:
            raise ValueError("steer moves thresholds towards a capacity; give no threshold with it.")
        shares = self.capacity.values() if isinstance(self.capacity, Mapping) else (self.capacity,)
        for share in shares:
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"capacity must be in (0, 1], got {share!r}; policy='none' skips every routed layer.")


def knob(
    policy: Policy | None = None,
    capacity: PerLayer | None = None,
    threshold: PerLayer | None = None,
    speed: float | None = None,
) -> Knob:
    """A knob; `speed` in [0, 1] stands for a capacity of 1 - speed, from dense to no routed layer at all.

    Raises:
        ValueError: something is out of range, or given in two ways.
    """
    if speed is None:
        return Knob(policy or "auto", capacity, threshold)
    if not 0 <= speed <= 1:
        raise ValueError(f"speed must be in [0, 1], got {speed!r}: 0 is dense, 1 skips every routed layer.")
    if capacity is not None or threshold is not None:
        raise ValueError("speed stands for a capacity: give one of speed, capacity and threshold.")
    if speed in (0, 1):
        return Knob("none" if speed else "all")
    return Knob(policy or "auto", 1 - speed)


def turn(
    standing: Knob,
    policy: Policy | None,
    capacity: PerLayer | None,
    threshold: PerLayer | None,
    speed: float | None,
    selection: Mapping[int, Tensor] | None,
) -> Knob:
    """The knob of one call: the standing one where nothing else is asked for, and a selection beside either."""
    asked = (policy, capacity, threshold, speed)
    turned = standing if asked == (None,) * 4 else knob(*asked)
    return turned if selection is None else replace(turned, selection=selection)


def of_layer(value: PerLayer | None, layer: int) -> float | None:
    """The value for a layer, if there is one."""
    return value.get(layer) if isinstance(value, Mapping) else value


@dataclass(frozen=True, slots=True)
class Note:
    """What one routed layer did in a call.

    Attributes:
        mask: (B, T), which tokens were processed.
        score: (B, T), the router's; `None` where it was not asked.
        student: (B, T), the student's logits; `None` where it was not asked.
        gate: (B, T), soft; `None` as the score.
        losses: scalars by name, in training only.
        details: further (B, T) of interest, by name.
    """

    mask: Tensor
    score: Tensor | None
    student: Tensor | None
    gate: Tensor | None
    losses: Mapping[str, Tensor]
    details: Mapping[str, Tensor]


@dataclass(slots=True)
class Call:
    """One forward call, handed through the stack to every layer.

    Attributes:
        policy: never "auto".
        knob: as asked.
        training: whether losses are wanted.
        calibrated: whether the model's tables of quantiles hold.
        keep: (B, T), False at padding; or `None`.
        rank: (B, T), how many tokens of the same document come before.
        past: how many tokens came in earlier calls.
        entering: by layer, the stream in front of it, where a router looks back.
        notes: by layer, what was done.
    """

    policy: Policy
    knob: Knob
    training: bool
    calibrated: bool
    keep: Tensor | None
    rank: Tensor
    past: int
    entering: dict[int, Tensor] = field(default_factory=dict)
    notes: dict[int, Note] = field(default_factory=dict)

    def __deepcopy__(self, _memo: Any) -> None:
        """A copy of a model has made no call yet; the losses of this one belong to a graph that cannot be copied."""
        return


def places(
    shape: tuple[int, int], past: int, attention_mask: Any, position_ids: Tensor | None, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """Where padding is, and how many tokens of its document come before each: `keep` and `rank`, (B, T).

    Args:
        shape: B and T.
        past: tokens in earlier calls.
        attention_mask: (B, past + T), or (B, 1, T, past + T), or `None`.
        position_ids: (1 or B, T), starting anew with every document of a packed row; or `None`.
        device: of the results.
    """
    rows, tokens = shape
    order = torch.arange(tokens, device=device)
    if attention_mask is not None and attention_mask.ndim == 2:
        seen = attention_mask.to(device=device, dtype=torch.bool)
        return seen[:, -tokens:], (seen.cumsum(1) - 1)[:, -tokens:].clamp(min=0)
    if position_ids is not None and not past:
        ids = position_ids.expand(rows, -1)
        starts = torch.cat([torch.ones_like(ids[:, :1], dtype=torch.bool), ids[:, 1:] - ids[:, :-1] != 1], 1)
        return None, order - torch.where(starts, order, 0).cummax(1).values
    return None, (past + order).expand(rows, -1)
