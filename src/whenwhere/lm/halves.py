"""Half a decoder layer: its attention or its network, each with the norm in front and the residual path around it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..tokens import take
from .attention import Rotary
from .select import Chosen
from .subset import Around


@dataclass(frozen=True, slots=True)
class AttentionHalf:
    """x + attention(norm(x)), in the place of a decoder layer."""

    block: Any

    @property
    def self_attn(self) -> Any:
        """The attention."""
        return self.block.self_attn

    @property
    def input_layernorm(self) -> Any:
        """The norm in front of it."""
        return self.block.input_layernorm

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the attention."""
        found: Iterator[nn.Parameter] = self.block.self_attn.parameters()
        return found

    def forward(self, stream: Tensor, **more: Any) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        output: Tensor = stream + self.self_attn(hidden_states=self.input_layernorm(stream), **more)[0]
        return output


@dataclass(frozen=True, slots=True)
class Network:
    """x + mlp(norm(x)) on selected tokens, which do not look at each other."""

    block: Any

    def run(self, stream: Tensor, chosen: Chosen, around: Around, rows: Tensor | None, batch: int) -> Tensor:
        """The output for selected tokens, (R, k, D)."""
        del around, rows, batch
        return self.forward(take(stream, chosen.index))

    def whole(self, stream: Tensor, mask: Tensor | None, rotary: Rotary, cache: Any, more: dict[str, Any]) -> Tensor:
        """The output for all tokens."""
        del mask, rotary, cache, more
        return self.forward(stream)

    def skip(self, stream: Tensor, around: Around) -> None:
        """No token is processed, and nothing is to be kept."""

    def forward(self, stream: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        output: Tensor = stream + self.block.mlp(self.block.post_attention_layernorm(stream))
        return output
