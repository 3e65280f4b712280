"""Running a decoder layer on some of its tokens: their masks, rotations, keys and values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..tokens import take
from .attention import (
    AllKeys,
    Rotary,
    among_keys,
    among_selected,
    as_allowed,
    as_mask,
    repeated,
    take_rotary,
    take_rows,
)
from .cache import RoutedLayer
from .routing import KVScope
from .select import Chosen
from .slots import Keys


@dataclass(frozen=True, slots=True)
class Around:
    """What a decoder layer is called with beside the stream.

    Attributes:
        mask: (1 or B, 1, T, S), boolean or added to scores; or `None` for causal attention without padding.
        rotary: cosines and sines, (1 or B, T, D).
        memory: the layer's keys and values of earlier calls, or `None`.
        past: how many tokens came in earlier calls.
        more: further arguments, handed on.
    """

    mask: Tensor | None
    rotary: Rotary
    memory: RoutedLayer | None
    past: int
    more: dict[str, Any]

    def of_rows(self, rows: Tensor) -> "Around":
        """The same for some sequences; memory stays whole."""
        mask = self.mask if self.mask is None or len(self.mask) == 1 else self.mask[rows]
        cos, sin = (table if len(table) == 1 else table[rows] for table in self.rotary)
        return Around(mask, (cos, sin), self.memory, self.past, self.more)


@dataclass(frozen=True, slots=True)
class Subset:
    """A decoder layer that runs on selected tokens.

    Attributes:
        layer: of a Llama-like model, or its attention.
        scope: whose keys and values they attend to.
    """

    layer: Any
    scope: KVScope

    def run(self, stream: Tensor, chosen: Chosen, around: Around, rows: Tensor | None, batch: int) -> Tensor:
        """The block's output for selected tokens, (R, k, D)."""
        index = chosen.index
        rotary, before = take_rotary(around.rotary, index), take(stream, index)
        if self.scope == "all":
            whole = self._all_keys(stream, index, around)
            return self.whole(before, self._mask_all(chosen, around), rotary, whole, around.more)
        position = around.past + index
        if around.memory is None:
            return self.whole(before, self._mask(position, chosen, around, None), rotary, None, around.more)
        begun = around.memory.get_seq_length() > 0
        keys = around.memory.expect(batch, position, chosen.valid, rows)
        if not begun and chosen.valid is None and rows is None and not around.memory.slots.window:
            mask = self._mask(position, chosen, around, None)
        else:
            mask = self._mask(position, chosen, around, keys)
        return self.whole(before, mask, rotary, _Only(around.memory), around.more)

    def _mask(self, position: Tensor, chosen: Chosen, around: Around, keys: Keys | None) -> Tensor | None:
        reuse = self.scope == "reuse"
        if keys is None and around.mask is None and chosen.valid is None and not reuse:
            return None
        window = 0 if around.memory is None else around.memory.slots.window
        if keys is not None and chosen.places == 1 and not reuse and not window and keys.filled.all():
            return None  # every key is an earlier one; attention without a mask does not repeat keys for their groups
        allowed = among_selected(chosen, around.mask) if keys is None else among_keys(position, keys, window)
        if keys is None and reuse:
            keys = Keys(position, torch.ones_like(position, dtype=torch.bool) if chosen.valid is None else chosen.valid)
        added = repeated(position, keys) if reuse and keys is not None else None
        return self._as_mask(allowed, added)

    def _mask_all(self, chosen: Chosen, around: Around) -> Tensor | None:
        """Selected tokens look at all tokens before them."""
        tokens = chosen.mask.shape[1]
        if around.mask is not None:
            allowed = take_rows(as_allowed(around.mask), chosen.index)
        elif chosen.places == tokens and chosen.valid is None and not around.past:
            return None
        else:
            order = torch.arange(around.past + tokens, device=chosen.index.device)
            allowed = (order <= around.past + chosen.index[..., None])[:, None]
        return self._as_mask(allowed | ~allowed.any(-1, keepdim=True), None)

    def _as_mask(self, allowed: Tensor, added: Tensor | None) -> Tensor:
        parameter = next(self.layer.parameters())
        return as_mask(allowed, added, self._implementation() == "eager", parameter.dtype)

    def _implementation(self) -> str:
        attention: Any = self.layer.self_attn
        return str(attention.config._attn_implementation)

    def _all_keys(self, stream: Tensor, index: Tensor, around: Around) -> AllKeys:
        if around.memory is not None:
            place = torch.arange(stream.shape[1], device=stream.device).expand(len(stream), -1)
            around.memory.expect(len(stream), around.past + place, None)
        return AllKeys(self.layer, stream, around.rotary, index, around.memory)

    def skip(self, stream: Tensor, around: Around) -> None:
        """No token is processed; with keys and values of all tokens, these are still kept."""
        if self.scope == "all" and around.memory is not None:
            nobody = torch.zeros(len(stream), 0, dtype=torch.long, device=stream.device)
            whole = self._all_keys(stream, nobody, around)
            keys, values = whole.project(nobody)
            whole.update(keys, values)

    def whole(self, stream: Tensor, mask: Tensor | None, rotary: Rotary, cache: Any, more: dict[str, Any]) -> Tensor:
        """Run the layer. Not as a module: what is recorded as hidden states is the whole stream behind this one."""
        run: Callable[..., Any] = self.layer.forward
        output = run(
            stream,
            attention_mask=mask,
            position_embeddings=rotary,
            past_key_values=cache,
            use_cache=cache is not None,
            **more,
        )
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


@dataclass(slots=True)
class _Only:
    """A cache of one layer, as attention sees it."""

    memory: RoutedLayer

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.memory.update(keys, values)
