"""The tokens in front of a routed layer, with what is known about them."""

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tokens:
    """The stream in front of a routed layer.

    Attributes:
        stream: x, (B, T, D).
        earlier: (B, T, D), the stream in front of the layer before.
        keep: (B, T), False at padding; or `None`.
        rank: (B, T), how many tokens of the same document come before.
        memory: what the layer remembers of earlier calls, one row per sequence; or `None`.
    """

    stream: Tensor
    earlier: Tensor
    keep: Tensor | None
    rank: Tensor
    memory: MutableMapping[str, Tensor] | None

    def previous(self, values: Tensor, name: str) -> Tensor:
        """Each token's predecessor's values (B, T, D), zeros at the start of a document; the last is remembered."""
        last = None if self.memory is None else self.memory.get(name)
        if last is None:
            last = torch.zeros_like(values[:, 0])
        if self.memory is not None:
            self.memory[name] = values[:, -1].detach()
        shifted = torch.cat([last[:, None].to(values.dtype), values[:, :-1]], 1)
        return shifted.masked_fill((self.rank == 0)[..., None], 0)

    def recall(self, values: Tensor, name: str, count: int) -> Tensor | None:
        """The values (B, P) of up to `count` tokens before these, which join them in memory; `None` without memory."""
        if self.memory is None:
            return None
        past = self.memory.get(name, values[:, :0])
        joined = torch.cat([past, values.detach()], 1)
        self.memory[name] = joined[:, max(0, joined.shape[1] - count) :]
        return past

    def mean(self, values: Tensor) -> Tensor:
        """The mean of values (B, T) over the tokens that are no padding."""
        return mean_over(values, self.keep)


def mean_over(values: Tensor, keep: Tensor | None) -> Tensor:
    """The mean of values (B, T) where `keep` is true."""
    if keep is None:
        return values.mean()
    return (values * keep).sum() / keep.sum().clamp(min=1)
