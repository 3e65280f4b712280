"""Decisions: what to do at one site and step, and the memory they use.

A decision is a small frozen object. It gets the call it stands in front of and the slot of its method at this site, and
returns what the module would have returned. What a module returns is passed around as it is: a tensor, or tuples, lists
and dictionaries of tensors.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .clock import Step
from .layout import Branches
from .pricing.unit import Macs, Unit
from .site import Site

Output = Any  # a tensor, or tuples, lists, dictionaries and output objects of tensors


@dataclass(slots=True)
class Call:
    """One call of a site's module, intercepted.

    Attributes:
        site, step: where and when.
        forward: what comes next: the inner decision, or the module itself.
        args, kwargs: what the caller passed.
        branches: the guidance branches of the batch; `None` in the first step where nobody declared them yet.
        module: the module itself.
        alone: runs the module past every decision about it and about the sites inside; nothing of it is traced.
        method: the method whose decision this is, as it was fitted to the model.
        notes: what the method wrote down in this generation; it outlives the memory, so no large tensor stays in it.
    """

    site: Site
    step: Step
    forward: Callable[..., Output]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    branches: Branches | None
    module: nn.Module | None = None
    alone: Callable[..., Output] | None = None
    method: Any = None
    notes: dict[str, Any] = field(default_factory=dict)

    def run(self) -> Output:
        """Run what comes next on the arguments as they are."""
        return self.forward(*self.args, **self.kwargs)

    @property
    def tokens(self) -> Tensor:
        """The features that enter the site: the first argument, or the one called `hidden_states` or `sample`."""
        if self.args:
            return self.args[0]  # type: ignore[no-any-return]
        kwargs = self.kwargs
        return kwargs["hidden_states"] if "hidden_states" in kwargs else kwargs["sample"]  # type: ignore[no-any-return]


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
    unsettled: list[tuple[Slot, "Keep", Call]] = field(default_factory=list)

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


@dataclass(frozen=True, slots=True)
class Keep:
    """What to keep of an output.

    Attributes:
        name: a word for the printed plan.
        of: maps an output to what is kept of it, given the guidance branches.
        size: the bytes that are kept per image, given the bytes of one row of every tensor of the output and the
        number of
            branches; what makes the plan's bytes.
        folds: whether one branch is made of all, so that `of` needs to know them.
    """

    name: str
    of: Callable[[Output, Branches | None], Output]
    size: Callable[[Sequence[int], int], int]
    folds: bool = False

    def folds_by(self, branches: Branches | None) -> int:
        """How many times fewer rows are kept than came in."""
        return len(branches.roles) if self.folds and branches is not None else 1


class Decision(ABC):
    """What to do at one site and step."""

    symbol: ClassVar[str]  # one character, for the printed plan
    name: ClassVar[str]  # a word, for legends
    recalls: ClassVar[bool] = False  # whether it needs something remembered
    stops: ClassVar[bool] = False  # whether the module itself does not run, nor anything inside it
    neutral: ClassVar[bool] = False  # whether nothing but computing is done
    shared: bool = False  # whether its slot is the same in every pass
    home: str = ""  # names the slot that several sites share; without a name every site has its own

    @abstractmethod
    def apply(self, call: Call, slot: Slot) -> Output:
        """Return what stands for the module's output."""

    def fresh(self) -> "Decision":
        """What to do instead when nothing is remembered, or when another method asks for a full evaluation."""
        return self

    def share(self) -> float:
        """The share of the site's multiply-adds that is spent, in [0, 1]."""
        return 0.0 if self.stops else 1.0

    def inner_branches(self, branches: int) -> int:
        """Guidance branches that reach the sites inside, given those that enter."""
        return branches

    def inner_layout(self, branches: Branches) -> Branches:
        """The layout that reaches the sites inside, given the one that enters."""
        return branches

    @property
    def keeps(self) -> bool:
        """Whether something is remembered afterwards that was not before."""
        return False

    def bare(self) -> "Decision":
        """The same without keeping anything: what remains of it where no later step recalls."""
        return self

    def kept_bytes(self, parts: Sequence[int], branches: int) -> int:  # noqa: ARG002
        """Bytes per image that are newly remembered, given those of one row of every tensor of the output."""
        return 0

    def held_bytes(self, unit: Unit, branches: int, samples: int) -> int:
        """Bytes that are newly remembered, all samples together."""
        return self.kept_bytes(unit.bytes, branches) * samples

    def saved(self, unit: Unit) -> Macs:  # noqa: ARG002
        """Multiply-adds of one row that are not spent although the module runs."""
        return Macs()

    def extra(self, unit: Unit, samples: int) -> Macs:  # noqa: ARG002
        """Multiply-adds spent beyond the site's own, all samples together."""
        return Macs()


@dataclass(frozen=True, slots=True)
class Compute(Decision):
    """Run the module; keep its output, or a part of it, if asked to."""

    keep: Keep | None = None
    shared: bool = False

    symbol: ClassVar[str] = "#"
    name: ClassVar[str] = "computed"
    neutral: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """Run, and remember for later."""
        output = call.run()
        if self.keep is None:
            return output
        slot.put(self.keep.of(output, call.branches), call, self.keep.folds_by(call.branches))
        if self.keep.folds and call.branches is None:
            slot.memory.unsettled.append((slot, self.keep, call))
        return output

    @property
    def keeps(self) -> bool:
        """Whether a keep is asked for."""
        return self.keep is not None

    def bare(self) -> Decision:
        """Run the module, nothing else."""
        return Compute()

    def kept_bytes(self, parts: Sequence[int], branches: int) -> int:
        """As many as the keep says."""
        return 0 if self.keep is None else self.keep.size(parts, branches)


def _whole(output: Output, _: Branches | None) -> Output:
    return output


def _outline(output: Output, _: Branches | None) -> Output:
    return map_tensors(output, lambda t: t.new_zeros(()).expand(t.shape))


whole = Keep("whole", _whole, size=lambda parts, branches: branches * sum(parts))
# A stand-in of the same shape that occupies one number. It is what flows through a part of the network that is skipped,
# up to the site whose output was really kept.
outline = Keep("outline", _outline, size=lambda _parts, _branches: 0)


@dataclass(frozen=True, slots=True)
class Reuse(Decision):
    """Return what was kept instead of running the module."""

    keep: Keep = whole  # what to keep if the module has to run after all
    shared: bool = False

    symbol: ClassVar[str] = "."
    name: ClassVar[str] = "reused"
    recalls: ClassVar[bool] = True
    stops: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """Recall."""
        kept = slot.get(call)
        return map_tensors(kept, _room) if self.keep is outline else kept

    def fresh(self) -> Decision:
        """Run and keep."""
        return Compute(self.keep, self.shared)


def map_tensors(value: Output, change: Callable[[Tensor], Tensor]) -> Output:
    """Apply a change to every tensor in nested tuples, lists, dictionaries and output objects; leave the rest."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, dict):  # diffusers' output objects are ordered dictionaries too
        return type(value)(**{key: map_tensors(item, change) for key, item in value.items()})
    return value


def _room(tensor: Tensor) -> Tensor:
    """Memory of an outline's shape for a while, with nothing in it: networks add to what blocks return in place."""
    return tensor.new_empty(tensor.shape)


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
