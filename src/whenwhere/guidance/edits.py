"""Edits: what becomes of a positive and a negative attention output, with its settings; and the tally kept of it."""

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..decision import Call, Decision
from .operator import Norm, blend, bound, nasa


class Guided(Decision):
    """What all decisions of guidance look like in a table."""

    symbol: ClassVar[str] = "g"
    name: ClassVar[str] = "guided away from the negative text"


class Edit(Protocol):
    """From Z+ and Z-, both (B, N, D), to what is projected."""

    def __call__(self, positive: Tensor, negative: Tensor, tally: "Tally") -> Tensor:
        """The guided output, in the type of Z+."""


@dataclass(frozen=True, slots=True)
class Normalized:
    """`operator.nag` with its settings."""

    scale: float
    tau: float
    alpha: float
    norm: Norm

    def __call__(self, positive: Tensor, negative: Tensor, tally: "Tally") -> Tensor:
        """Guide, and note what the norms said."""
        ratio, factor = bound(positive, negative, self.scale, self.tau, self.norm)
        tally.add(ratio, factor, self.alpha * (self.scale - 1))
        return blend(positive, negative, factor, self.scale, self.alpha)


@dataclass(frozen=True, slots=True)
class Subtracted:
    """`operator.nasa` with its setting."""

    phi: float

    def __call__(self, positive: Tensor, negative: Tensor, tally: "Tally") -> Tensor:  # noqa: ARG002
        """Guide."""
        return nasa(positive, negative, self.phi)


@dataclass(frozen=True, slots=True)
class Report:
    """What guidance did in one generation.

    Attributes:
        layers: paths of the guided attentions.
        steps: numbers of the steps in which something was guided.
        rows: conditional rows of one call.
        ratio: mean of R, how much a token's norm would have grown; 1 where the operator has no norm.
        clipped: share of the tokens whose norm was bounded, in [0, 1].
        scale: mean effective scale alpha c phi; alpha phi where nothing was clipped.
    """

    layers: tuple[str, ...]
    steps: tuple[int, ...]
    rows: int
    ratio: float
    clipped: float
    scale: float

    def __str__(self) -> str:
        return (
            f"{len(self.layers)} layers in {len(self.steps)} steps, {self.rows} rows: mean norm ratio "
            f"{self.ratio:.3f}, {self.clipped:.1%} of the tokens clipped, effective scale {self.scale:.3f}"
        )


@dataclass(slots=True)
class Tally:
    """Sums over the tokens guided in one generation; three numbers stay on the device until somebody asks."""

    layers: dict[str, None] = field(default_factory=dict)
    steps: set[int] = field(default_factory=set)
    rows: int = 0
    tokens: int = 0
    sums: Tensor | None = None  # of R, of whether c < 1, of alpha c phi

    @classmethod
    def of(cls, notes: MutableMapping[str, Any]) -> "Tally":
        """The tally in a method's notes."""
        return notes.setdefault("tally", cls())  # type: ignore[no-any-return]

    @classmethod
    def at(cls, call: Call, rows: int) -> "Tally":
        """The tally of a call's method, with where and when it is called noted, and how many rows."""
        tally = cls.of(call.notes)
        tally.layers[call.site.path] = None
        tally.steps.add(call.step.index)
        tally.rows = rows
        return tally

    def add(self, ratio: Tensor, factor: Tensor, scale: float) -> None:
        """Note what the norms of some tokens said, (B, N, 1) each."""
        sums = torch.stack([ratio.sum(), (factor < 1).sum(), scale * factor.sum()])
        self.sums = sums if self.sums is None else self.sums + sums
        self.tokens += factor.numel()

    def report(self) -> Report:
        """The means; waits for the device."""
        means = [1.0, 0.0, 0.0] if self.sums is None else (self.sums / self.tokens).tolist()
        return Report(tuple(self.layers), tuple(sorted(self.steps)), self.rows, *means)
