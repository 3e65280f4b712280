"""Where the entries of a routed layer's cache lie: one per processed token, so every sequence has its own count."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .routing import CacheOverflow

_SPARE = 16  # slots made beyond those needed, so that not every token copies all entries


@dataclass(frozen=True, slots=True)
class Keys:
    """Where the keys of a layer come from: positions (B, S) in the text, and which of the S slots are filled."""

    position: Tensor
    filled: Tensor


@dataclass(frozen=True, slots=True)
class Write:
    """Where new entries go: that of row `source` and place `place` into slot `slot` of sequence `row`, each (n,).

    Attributes:
        rows: (R,), the sequences that the new entries belong to; all if `None`.
        length: how many slots the longest of these sequences has filled then.
    """

    row: Tensor
    slot: Tensor
    source: Tensor
    place: Tensor
    rows: Tensor | None
    length: int


class Slots:
    """The slots of every sequence, filled from the front in the order of the text.

    Attributes:
        position: (B, S), the tokens' places in the text, where S is the length of the longest sequence; or `None`.
        count: (B,), how many slots of a sequence are filled; or `None`.
        even: whether all sequences have filled the same number of slots.

    Args:
        limit: how many slots a sequence has at most; 0 for as many as it needs.
        overflow: what happens when they are full.
    """

    def __init__(self, limit: int, overflow: CacheOverflow) -> None:
        self.limit, self.overflow = limit, overflow
        self.position: Tensor | None = None
        self.count: Tensor | None = None
        self.even = True

    @property
    def length(self) -> int:
        """S."""
        return 0 if self.position is None else self.position.shape[1]

    @property
    def window(self) -> int:
        """How many of the last entries a token sees, its own included; 0 for all, as long as there is room."""
        return self.limit if self.overflow == "evict_oldest" and self.length > self.limit else 0

    def room(self, mask: Tensor) -> Tensor:
        """Those of the selected tokens (B, T) for which there is room, where tokens are skipped otherwise."""
        if not self.limit or self.overflow != "force_skip":
            return mask
        held = mask.new_zeros(len(mask), dtype=torch.long) if self.count is None else self.count
        return mask & (held[:, None] + mask.cumsum(1) <= self.limit)

    def expect(self, batch: int, position: Tensor, valid: Tensor | None, rows: Tensor | None) -> tuple[Keys, Write]:
        """Fill slots by tokens at places (R, k) in the text, rising where `valid`, (R, k) or `None` if all are.

        Returns:
            the keys of these sequences, the new ones included, and where the new entries go.

        Raises:
            ValueError: there is no room, and that is an error.
        """
        count = position.new_zeros(batch) if self.count is None else self.count
        held = position.new_zeros(batch, 0) if self.position is None else self.position
        self.even = self.even and valid is None and rows is None
        marks = torch.ones_like(position, dtype=torch.bool) if valid is None else valid
        among = torch.arange(batch, device=position.device) if rows is None else rows
        slot = count[among][:, None] + marks.cumsum(1) - 1
        source, place = marks.nonzero(as_tuple=True)
        row, slot = among[source], slot[source, place]
        self.count = count.index_add(0, among, marks.sum(1))
        length = int(self.count.max())
        if self.limit and length > self.limit and self.overflow == "error":
            raise ValueError(
                f"a routed layer needs {length} cache entries, and cache_slots={self.limit}; give more, or set "
                "cache_overflow='force_skip' or 'evict_oldest'."
            )
        held = pad(held, (0, length - held.shape[1]))
        self.position = held.index_put((row, slot), position[source, place])
        count = self.count[among]
        own = length if rows is None else int(count.max())
        filled = torch.arange(own, device=position.device) < count[:, None]
        return Keys(self.position[among, :own], filled), Write(row, slot, source, place, rows, own)

    def written(self, room: Tensor, new: Tensor, write: Write) -> Tensor:
        """Room (B, H, at least S, D) with the new entries (R, H, k, D) in their slots; in place where that can be."""
        if room.shape[2] < self.length:
            room = pad(room, (0, 0, 0, self.length + _SPARE - room.shape[2]))
        elif new.requires_grad:
            room = room.clone()  # what was handed out before is part of a graph
        if self.even:
            room[:, :, self.length - new.shape[2] : self.length] = new
        else:
            entries = new.transpose(1, 2)[write.source, write.place]
            room.transpose(1, 2).index_put_((write.row, write.slot), entries)
        return room

    def evict(self) -> Tensor:
        """Forget all but the last entries of every sequence; gives the slots that stay, (B, limit)."""
        assert self.position is not None
        assert self.count is not None
        over = (self.count - self.limit).clamp(min=0)
        index = over[:, None] + torch.arange(self.limit, device=over.device)
        index = index.clamp(max=self.length - 1)
        self.position, self.count = self.position.gather(1, index), self.count - over
        return index

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Keep, repeat or reorder sequences."""
        if self.position is not None and self.count is not None:
            self.position, self.count = change(self.position), change(self.count)
