"""Keys and values of a routed layer: one entry per processed token, so every sequence has a length of its own.

A layer of a `transformers` cache. Entries are rotated at their original positions and never move. What routers
remember of earlier tokens lies beside them, so reordering, repeating and selecting sequences reaches everything.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from .routing import Routing
from .slots import Keys, Slots, Write


class RoutedLayer(CacheLayerMixin):  # type: ignore[misc]
    """The entries of one routed layer.

    Attributes:
        keys, values: (B, H, S, D), where S is the length of the longest sequence.
        slots: which of them are filled, and by which tokens.
        memory: what routers remember, each (B, ...).

    Args:
        routing: the method, which says whose entries there are, and how many at most.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, routing: Routing) -> None:
        super().__init__()
        self.routing = routing
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.slots = Slots(self.routing.cache_slots, self.routing.cache_overflow)
        self.memory: dict[str, Tensor] = {}
        self.is_initialized = False
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._rooms: tuple[Tensor, Tensor] | None = None  # keys and values, with slots to spare
        self._write: Write | None = None

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
        keys, self._write = self.slots.expect(batch, position, valid, rows)
        return keys

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin without entries."""
        rows = len(key_states) if self.slots.count is None else len(self.slots.count)
        self.dtype, self.device = key_states.dtype, key_states.device
        self._hold(
            key_states.new_zeros(rows, key_states.shape[1], 0, key_states.shape[3]),
            value_states.new_zeros(rows, value_states.shape[1], 0, value_states.shape[3]),
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write expected entries (R, H, k, D); give all of these sequences, (R, H, S, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._rooms is not None
        assert self._write is not None
        write, slots = self._write, self.slots
        self._hold(slots.written(self._rooms[0], key_states, write), slots.written(self._rooms[1], value_states, write))
        assert self.keys is not None
        assert self.values is not None
        found = self.keys, self.values
        if write.rows is not None:
            found = self.keys[write.rows, :, : write.length], self.values[write.rows, :, : write.length]
        if slots.window:
            index = slots.evict()[:, None, :, None]
            self._hold(*(held.gather(2, index.expand(-1, held.shape[1], -1, held.shape[3])) for held in self._rooms))
        return found

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        """Keep keys and values in rooms with at least as many slots as are needed."""
        self._rooms = keys, values
        self.keys, self.values = keys[:, :, : self.slots.length], values[:, :, : self.slots.length]

    def get_seq_length(self) -> int:
        """S, the number of entries of the longest sequence; no measure of positions in the text."""
        return self.slots.length

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
        if self.routing.kv_scope == "reuse":
            raise NotImplementedError("kv_scope='reuse' does not work with beam search; use 'selected' or 'all'.")
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        self._change(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence so many times."""
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.slots.change(change)
        if self.keys is not None and self.values is not None:
            self._hold(change(self.keys), change(self.values))
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
    """Bytes of keys and values that a cache holds, by layer, measured on its tensors; spare slots are not counted."""
    return {
        i: sum(tensor.numel() * tensor.element_size() for tensor in (layer.keys, layer.values) if tensor is not None)
        for i, layer in enumerate(cache.layers)
    }
