"""Who attends to whom among selected tokens: masks, and keys and values of tokens that are not selected."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ..tokens import take
from .cache import RoutedLayer
from .select import Chosen
from .slots import Keys

Rotary = tuple[Tensor, Tensor]


def take_rotary(rotary: Rotary, index: Tensor) -> Rotary:
    """Cosines and sines (1 or B, T, D) at the tokens (B, k): positions stay the original ones."""
    cos, sin = (table.expand(index.shape[0], -1, -1) for table in rotary)
    return take(cos, index), take(sin, index)


def as_allowed(attention_mask: Tensor) -> Tensor:
    """A mask of four dimensions, boolean or added to scores, as who may look at whom."""
    if attention_mask.dtype == torch.bool:
        return attention_mask
    return attention_mask > torch.finfo(attention_mask.dtype).min / 2


def among_selected(chosen: Chosen, attention_mask: Tensor | None) -> Tensor:
    """Selected tokens look at selected tokens that they may look at, and at themselves: (B, 1, k, k)."""
    index, tokens = chosen.index, chosen.mask.shape[1]
    if attention_mask is None:
        allowed = (index[:, :, None] >= index[:, None, :])[:, None]
    else:
        allowed = take_rows(as_allowed(attention_mask)[..., -tokens:], index)
        allowed = allowed.gather(3, index[:, None, None, :].expand(-1, 1, index.shape[1], -1))
    if chosen.valid is not None:
        allowed = allowed & chosen.valid[:, None, None, :]
    return allowed | torch.eye(index.shape[1], dtype=torch.bool, device=index.device)


def take_rows(allowed: Tensor, index: Tensor) -> Tensor:
    """What the tokens (B, k) may look at: (1 or B, 1, T, S) -> (B, 1, k, S)."""
    allowed = allowed.expand(index.shape[0], -1, -1, -1)
    return allowed.gather(2, index[:, None, :, None].expand(-1, 1, -1, allowed.shape[3]))


def among_keys(position: Tensor, keys: Keys, window: int = 0) -> Tensor:
    """Tokens at positions (B, k) look at the keys of earlier ones: (B, 1, k, S). One that finds none looks anywhere.

    With a window they look at so many of the last ones, their own included.
    """
    allowed = (keys.filled[:, None, :] & (keys.position[:, None, :] <= position[:, :, None]))[:, None]
    if window:
        allowed = allowed & (allowed.sum(-1, keepdim=True) - allowed.cumsum(-1) < window)
    return allowed | ~allowed.any(-1, keepdim=True)


def repeated(position: Tensor, keys: Keys) -> Tensor:
    """Logarithm of how often a key stands there if skipped tokens repeat the last key before them: (B, 1, k, S).

    A key that is looked at n times has n times the weight, which is log n added to its score. A token that looks is
    itself selected, so the repetitions of a key end at the next one, and its own key stands once.
    """
    far = torch.iinfo(torch.long).max
    upcoming = torch.where(keys.filled, keys.position, far).flip(1).cummin(1).values.flip(1)
    following = torch.cat([upcoming[:, 1:], torch.full_like(upcoming[:, :1], far)], 1)
    times = torch.where(following == far, 1, following - keys.position).clamp(min=1)
    own = keys.position[:, None, :] == position[:, :, None]
    return torch.where(own, 0.0, times.log()[:, None, :])[:, None]


def as_mask(allowed: Tensor, added: Tensor | None, eager: bool, dtype: torch.dtype) -> Tensor:
    """In the form that attention takes: boolean, or added to scores if it is eager or something is to be added."""
    if not eager and added is None:
        return allowed
    start = torch.zeros_like(allowed, dtype=dtype) if added is None else added.to(dtype).expand_as(allowed)
    return start.masked_fill(~allowed, torch.finfo(dtype).min)


@dataclass(slots=True)
class AllKeys:
    """Stands in for a cache while a block runs on selected tokens: adds keys and values of the others.

    Attributes:
        block: the decoder layer.
        stream: (B, T, D), in front of it.
        rotary: of all T tokens.
        index: (B, k), the selected ones.
        memory: where all of them are kept, if anywhere; it expects them.
    """

    block: Any
    stream: Tensor
    rotary: Rotary
    index: Tensor
    memory: RoutedLayer | None

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, k, D) of selected tokens -> (B, H, S, D) of all tokens, those in memory included."""
        marks = self.index.new_zeros(self.stream.shape[:2])
        others = marks.scatter(1, self.index, 1).sort(dim=1, stable=True).indices
        others = others[:, : self.stream.shape[1] - self.index.shape[1]]
        back = torch.cat([self.index, others], 1).argsort(dim=1)[:, None, :, None]
        more_keys, more_values = self.project(others)
        keys, values = torch.cat([keys, more_keys], 2), torch.cat([values, more_values], 2)
        keys = keys.gather(2, back.expand(-1, keys.shape[1], -1, keys.shape[3]))
        values = values.gather(2, back.expand(-1, values.shape[1], -1, values.shape[3]))
        return (keys, values) if self.memory is None else self.memory.update(keys, values)

    def project(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, n, D) of the tokens (B, n), as the block would project them."""
        attention = self.block.self_attn
        normed = self.block.input_layernorm(take(self.stream, index))
        keys, values = (
            layer(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for layer in (attention.k_proj, attention.v_proj)
        )
        keys = attention.k_norm(keys) if hasattr(attention, "k_norm") else keys  # Qwen3's, over every head by itself
        _, keys = apply_rotary_pos_emb(keys, keys, *take_rotary(self.rotary, index))
        return keys, values
