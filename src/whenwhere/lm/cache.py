"""Keys and values of a routed layer: one entry per processed token, so every sequence has a length of its own.

A layer of a `transformers` cache. Entries are rotated at their original positions and never move. What routers
remember of earlier tokens lies beside them, so reordering, repeating and selecting sequences reaches everything.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from .routing import Routing


@dataclass(frozen=True, slots=True)
class Keys:
    """Where the keys of a layer come from: positions (B, S) in the text, and which of the S slots are filled."""

    position: Tensor
    filled: Tensor


class RoutedLayer(CacheLayerMixin):  # type: ignore[misc]
    """The entries of one routed layer.

    Attributes:
        keys, values: (B, H, S, D), where S is the length of the longest sequence.
        position: (B, S), the tokens' places in the text.
        count: (B,), how many slots of a sequence are filled, from the front.
        memory: what routers remember, each (B, ...).

    Args:
        routing: the method, which says whose entries there are, and how many at most.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, routing: Routing) -> None:
        super().__init__()
        self.scope = routing.kv_scope
        self.slots, self.overflow = routing.cache_slots, routing.cache_overflow
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.position: Tensor | None = None
        self.count: Tensor | None = None
        self.memory: dict[str, Tensor] = {}
        self.even = True  # all sequences have filled the same number of slots
        self.is_initialized = False
        self._slots: tuple[Tensor, Tensor, Tensor] | None = None
        self._rows: Tensor | None = None

    def expect(self, batch: int, position: Tensor, valid: Tensor | None, rows: Tensor | None = None) -> Keys:
        """Make room for the entries that the next `update` brings.

        Args:
            batch: B.
            position: (R, k), places in the text, rising where valid.
            valid: (R, k), or `None` if all are.
            rows: (R,), the sequences they belong to; all if `None`.

        Returns:
            the keys of these sequences, the new ones included.

        Raises:
            ValueError: there is no room, and that is an error.
        """
        count = position.new_zeros(batch) if self.count is None else self.count
        held = position.new_zeros(batch, 0) if self.position is None else self.position
        self.even = self.even and valid is None and rows is None
        marks = torch.ones_like(position, dtype=torch.bool) if valid is None else valid
        among = torch.arange(batch, device=position.device) if rows is None else rows
        slot = count[among][:, None] + marks.cumsum(1) - 1
        row, place = marks.nonzero(as_tuple=True)
        self._slots, self._rows = (among[row], slot[row, place], place), rows
        self._taken = row
        self.count = count.index_add(0, among, marks.sum(1))
        length = int(self.count.max())
        if self.slots and length > self.slots and self.overflow == "error":
            raise ValueError(
                f"a routed layer needs {length} cache entries, and cache_slots={self.slots}; give more, or set "
                "cache_overflow='force_skip' or 'evict_oldest'."
            )
        held = pad(held, (0, length - held.shape[1]))
        self.position = held.index_put(self._slots[:2], position[row, place])
        filled = torch.arange(length, device=position.device) < self.count[:, None]
        return Keys(self.position[among], filled[among])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin without entries."""
        rows = len(key_states) if self.count is None else len(self.count)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(rows, key_states.shape[1], 0, key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], 0, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write expected entries (R, H, k, D); give all of these sequences, (R, H, S, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self._written(self.keys, key_states), self._written(self.values, value_states)
        rows, self._slots = self._rows, None
        found = (self.keys, self.values) if rows is None else (self.keys[rows], self.values[rows])
        if self.window:
            self._evict()
        return found

    @property
    def window(self) -> int:
        """How many of the last entries a token sees, its own included; 0 for all, as long as there is room."""
        full = self.overflow == "evict_oldest" and self.position is not None and self.position.shape[1] > self.slots
        return self.slots if full else 0

    def room(self, mask: Tensor) -> Tensor:
        """Those of the selected tokens (B, T) for which there is room, where tokens are skipped otherwise."""
        if not self.slots or self.overflow != "force_skip":
            return mask
        held = mask.new_zeros(len(mask), dtype=torch.long) if self.count is None else self.count
        return mask & (held[:, None] + mask.cumsum(1) <= self.slots)

    def _evict(self) -> None:
        """Keep the last entries of every sequence."""
        assert self.keys is not None
        assert self.values is not None
        assert self.position is not None
        assert self.count is not None
        over = (self.count - self.slots).clamp(min=0)
        index = over[:, None] + torch.arange(self.slots, device=over.device)  # (B, slots)
        index = index.clamp(max=self.position.shape[1] - 1)
        deep = index[:, None, :, None]
        self.keys = self.keys.gather(2, deep.expand(-1, self.keys.shape[1], -1, self.keys.shape[3]))
        self.values = self.values.gather(2, deep.expand(-1, self.values.shape[1], -1, self.values.shape[3]))
        self.position, self.count = self.position.gather(1, index), self.count - over

    def _written(self, held: Tensor, new: Tensor) -> Tensor:
        assert self._slots is not None
        assert self.position is not None
        if self.even:
            return torch.cat([held, new], 2)
        row, slot, place = self._slots
        longer = pad(held, (0, 0, 0, self.position.shape[1] - held.shape[2]))
        return longer.transpose(1, 2).index_put((row, slot), new.transpose(1, 2)[self._taken, place]).transpose(1, 2)

    def get_seq_length(self) -> int:
        """S, the number of entries of the longest sequence; no measure of positions in the text."""
        return 0 if self.position is None else self.position.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys after so many new ones, and their offset."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Without limit."""
        return -1

    def crop(self, _tokens_to_remove: int) -> None:
        """Refused: which entries belong to the last tokens differs by sequence.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a routed layer cannot be cropped, so assisted decoding is not supported.")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequences in another order, for beam search.

        Raises:
            NotImplementedError: with `kv_scope="reuse"`.
        """
        if self.scope == "reuse":
            raise NotImplementedError("kv_scope='reuse' does not work with beam search; use 'selected' or 'all'.")
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        self._change(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence so many times."""
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def _change(self, change: Any) -> None:
        for name in ("keys", "values", "position", "count"):
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))
        self.memory = {name: change(tensor) for name, tensor in self.memory.items()}

    def offload(self) -> None:
        """Refused.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a routed layer cannot be offloaded; use the default cache.")


def routed_layer(cache: Cache | None, layer: int, routing: Routing) -> RoutedLayer | None:
    """The layer of a cache as a routed one, which takes the place of an unused ordinary one.

    Raises:
        ValueError: the cache is of another kind, or has entries of another model.
    """
    if cache is None:
        return None
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    found = cache.layers[layer]
    if isinstance(found, RoutedLayer):
        return found
    if type(found) is not DynamicLayer or cache.offloading:
        raise ValueError(
            f"routed layers need the dynamic cache; found {type(found).__name__}. Leave cache settings out."
        )
    if found.get_seq_length():
        raise ValueError("the cache was filled by a model without routing; begin with an empty one.")
    routed = RoutedLayer(routing)
    cache.layers[layer] = routed
    return routed


def cache_bytes(cache: Cache) -> dict[int, int]:
    """Bytes of keys and values that a cache holds, by layer, measured on its tensors."""
    return {
        i: sum(tensor.numel() * tensor.element_size() for tensor in (layer.keys, layer.values) if tensor is not None)
        for i, layer in enumerate(cache.layers)
    }
