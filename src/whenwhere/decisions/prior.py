"""Decisions about the scheduler's step: remember the latents that a generation starts from, add a share of them."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ..decision import Call, Compute, Decision, Output, Slot
from ..pricing.unit import Unit


@dataclass(frozen=True, slots=True)
class Prior(Decision):
    """Remember the latents that enter the first step; add a share of them to those that leave it."""

    alpha: float = 0.0
    keep: bool = True
    branches: int = 1  # whose latents the scheduler moves
    shared: bool = True  # the scheduler moves once, however many guidance calls there were

    symbol: ClassVar[str] = "#"
    name: ClassVar[str] = "computed"

    def apply(self, call: Call, slot: Slot) -> Output:
        """Move, and remember."""
        if self.keep:
            slot.put(call.kwargs["sample"], call)
        return _add(call.run(), call.kwargs["sample"], self.alpha)

    @property
    def keeps(self) -> bool:
        """Unless no later step needs it."""
        return self.keep

    def bare(self) -> Decision:
        """Add, if anything is to be added."""
        return replace(self, keep=False) if self.alpha else Compute()

    def held_bytes(self, unit: Unit, branches: int, samples: int) -> int:  # noqa: ARG002
        """The latents, which have no guidance branches in most families."""
        return sum(unit.bytes) * self.branches * samples


@dataclass(frozen=True, slots=True)
class Inject(Decision):
    """Add a share of the initial latents to those that leave this step, or to those that enter it."""

    alpha: float
    entering: bool = False
    shared: bool = True

    symbol: ClassVar[str] = "~"
    name: ClassVar[str] = "initial noise added"
    recalls: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """Move, and add; or add, and move."""
        if self.entering:
            return call.forward(**call.kwargs | {"sample": call.kwargs["sample"] + self.alpha * slot.get(call)})
        return _add(call.run(), slot.get(call), self.alpha)

    def fresh(self) -> Decision:
        """Without initial latents nothing is added."""
        return Compute()


def _add(moved: Output, initial: Tensor, alpha: float) -> Output:
    """A scheduler's answer with alpha times the initial latents added to its first part, the new latents."""
    if not alpha:
        return moved
    if isinstance(moved, tuple):
        return (moved[0] + alpha * initial, *moved[1:])
    return type(moved)(**{**moved, "prev_sample": moved["prev_sample"] + alpha * initial})
