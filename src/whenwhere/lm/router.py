"""The router in front of a layer: what scores tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from .tokens import Tokens


@dataclass(frozen=True, slots=True)
class Look:
    """What a router saw.

    Attributes:
        score: (B, T), float32; the highest are selected.
        gate: (B, T), the soft gate.
        losses: scalars that do not depend on the selection, by name.
        details: further (B, T) of interest, by name.
        dense: (B, T, D), the block's output for all tokens, where the router had to run it.
    """

    score: Tensor
    gate: Tensor
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    details: Mapping[str, Tensor] = field(default_factory=dict)
    dense: Tensor | None = None


class Router(nn.Module, ABC):
    """Scores the tokens in front of a layer.

    Attributes:
        looks_back: whether it looks at the stream in front of the layer before, too.
        runs_block: whether it has to run the block to score, so that it can only teach a student.
    """

    looks_back: ClassVar[bool] = False
    runs_block: ClassVar[bool] = False

    @abstractmethod
    def look(self, tokens: Tokens, run: Callable[[], Tensor]) -> Look:
        """Score all tokens; `run` gives the block's output for all of them, attending to all."""

    def losses(self, look: Look, mask: Tensor, keep: Tensor | None) -> Mapping[str, Tensor]:
        """Scalars that depend on the selection (B, T), by name; none unless a router says so."""
        del look, mask, keep
        return {}
