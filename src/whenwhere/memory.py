"""What is remembered within one generation: what is kept of an output, the slots it lies in, and their bytes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .call import Call, Output, map_tensors
from .layout import Branches


@dataclass(frozen=True, slots=True)
class Keep:
    """What to keep of an output.

    Attributes:
        name: a word for the printed plan.
        of: maps an output to what is kept of it, given the guidance branches.
        size: the bytes that are kept per image, given the bytes of one row of every tensor of the output and the
            number of branches; what makes the plan's bytes.
        folds: whether one branch is made of all, so that `of` needs to know them.
        hollow: whether some of it holds nothing, as nobody behind reads it.
    """

    name: str
    of: Callable[[Output, Branches | None], Output]
    size: Callable[[Sequence[int], int], int]
    folds: bool = False
    hollow: bool = False

    def folds_by(self, branches: Branches | None) -> int:
        """How many times fewer rows are kept than came in."""
        return len(branches.roles) if self.folds and branches is not None else 1


def _whole(output: Output, _: Branches | None) -> Output:
    return output


def _outline(output: Output, _: Branches | None) -> Output:
    return map_tensors(output, lambda t: t.new_zeros(()).expand(t.shape))


whole = Keep("whole", _whole, size=lambda parts, branches: branches * sum(parts))
# A stand-in of the same shape that occupies one number. It is what flows through a part of the network that is skipped,
# up to the site whose output was really kept.
outline = Keep("outline", _outline, size=lambda _parts, _branches: 0, hollow=True)


def room(tensor: Tensor) -> Tensor:
    """Memory of an outline's shape for a while, with nothing in it: networks add to what blocks return in place."""
    return tensor.new_empty(tensor.shape)


@dataclass(slots=True)
class Slot:
    """What one method remembers at one site, in one pass."""

    memory: "Memory"
    key: tuple[int, int | str, int]  # method, site or shared home, pass
    value: Output = None
    shape: torch.Size | None = None  # of the tokens that entered the site when the value was made
    like: tuple[torch.dtype, torch.device] | None = None
    step: int = -1  # when it was made
    bytes: int = 0

    @property
    def empty(self) -> bool:
        """Whether nothing is remembered."""
        return self.shape is None

    def beside(self, name: str) -> "Slot":
        """Another slot of the same method and pass, by a name: for what one site leaves for others."""
        method, _, pass_ = self.key
        return self.memory.slot(method, name, pass_)

    def put(self, value: Output, call: Call, branches: int = 1) -> None:
        """Remember a value made in this call, detached; one of so many branches is left in it."""
        tokens = call.tokens
        self.value = map_tensors(value, _owned)
        self.shape = torch.Size((tokens.shape[0] // branches, *tokens.shape[1:]))
        self.like, self.step = (tokens.dtype, tokens.device), call.step.index
        self.memory.account(self, nbytes(self.value))

    def get(self, call: Call) -> Output:
        """What is remembered, for a call whose tokens look like those it was made from.

        Raises:
            RuntimeError: shape, type or device of the tokens changed in the middle of a generation.
        """
        tokens = call.tokens
        if tokens.shape != self.shape or (tokens.dtype, tokens.device) != self.like:
            raise RuntimeError(
                f"step {call.step.index}: {call.site} was called with "
                f"{_describe(tokens.shape, tokens.dtype, tokens.device)}, but what is remembered since step "
                f"{self.step} was made from {_describe(self.shape, *self.like or ())}. "
                "Batch, resolution, type and device must not change within a generation; start a new one instead."
            )
        return self.value


@dataclass(slots=True)
class Memory:
    """All slots of one generation, and the bytes they hold."""

    slots: dict[tuple[int, int | str, int], Slot] = field(default_factory=dict)
    bytes: int = 0
    peak: int = 0
    unsettled: list[tuple[Slot, Keep, Call]] = field(default_factory=list)

    def slot(self, method: int, site: int | str, pass_: int) -> Slot:
        """The slot of a method at a site, or at the home that several sites share, in a pass."""
        key = (method, site, pass_)
        found = self.slots.get(key)
        if found is None:
            found = self.slots[key] = Slot(self, key)
        return found

    def account(self, slot: Slot, size: int) -> None:
        """Note that a slot now holds `size` bytes."""
        self.bytes += size - slot.bytes
        slot.bytes = size
        self.peak = max(self.peak, self.bytes)

    def settle(self, branches: Branches) -> None:
        """Finish what was kept before the guidance branches were known."""
        for slot, keep, call in self.unsettled:
            slot.put(keep.of(slot.value, branches), call, keep.folds_by(branches))
        self.unsettled.clear()

    def clear(self) -> None:
        """Forget everything but the peak."""
        self.slots.clear()
        self.unsettled.clear()
        self.bytes = 0


def _owned(tensor: Tensor) -> Tensor:
    """Detached, and copied where it is a view that would keep a larger tensor alive (joint attention returns such)."""
    tensor = tensor.detach()
    larger = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
    return tensor.clone() if larger else tensor


def nbytes(value: Output) -> int:
    """Bytes of memory that the tensors in a nested value hold; one is counted once, an outline never."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.numel() == 1 or storage.nbytes() > tensor.element_size():
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    map_tensors(value, note)
    return sum(storages.values())


def _describe(shape: torch.Size | None, dtype: object = "?", device: object = "?") -> str:
    return f"{tuple(shape or ())} {dtype} on {device}"
