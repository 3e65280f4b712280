"""Decisions about changes: what a block, or a run of blocks, adds to the features that pass through it.

A network of residual blocks has nothing that would bring the present input past a skipped run, so not the run's output
is remembered but its change, output minus input, and it is added to the present input. The changes of the blocks of a
run telescope, so they are summed up in one slot, whose name the blocks share: one tensor per run, however long it is.
What is added to the stream between blocks (position embeddings, the residuals of SD 3's and Flux's ControlNets) is no
part of it and stays fresh. What a passed block would read beside the stream is lost: long skips, and with them the
residuals of Hunyuan-DiT's ControlNet, which methods must refuse.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..decision import Call, Compute, Decision, Output, Slot


@dataclass(frozen=True, slots=True)
class KeepChange(Decision):
    """Run the block and keep its change, added to those of the blocks of the run that ran before it in this step."""

    home: str = ""

    symbol: ClassVar[str] = "#"
    name: ClassVar[str] = "computed"

    def apply(self, call: Call, slot: Slot) -> Output:
        """Run, and remember output minus input."""
        output = call.run()
        change = minus(output, entering(call, output))
        continued = not slot.empty and slot.step == call.step.index
        slot.put(plus(slot.value, change) if continued else change, call)
        return output

    @property
    def keeps(self) -> bool:
        """Always."""
        return True

    def bare(self) -> Decision:
        """Run the block, nothing else."""
        return Compute()

    def kept_bytes(self, parts: Sequence[int], branches: int) -> int:
        """As many as the output has."""
        return branches * sum(parts)


@dataclass(frozen=True, slots=True)
class AddChange(Decision):
    """Instead of running a block, or a run of blocks that it begins, add the change that is remembered."""

    home: str = ""

    symbol: ClassVar[str] = "+"
    name: ClassVar[str] = "change added"
    recalls: ClassVar[bool] = True
    stops: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """The present input plus what is remembered."""
        change = slot.get(call)
        return plus(entering(call, change), change)

    @property
    def hollow(self) -> bool:
        """Whether the change is that of a whole run."""
        return bool(self.home)

    def fresh(self) -> Decision:
        """Run and keep."""
        return KeepChange(self.home)


@dataclass(frozen=True, slots=True)
class Pass(Decision):
    """Hand the input on: the change of the run that this block belongs to was added at the run's first block."""

    home: str = ""

    symbol: ClassVar[str] = "-"
    name: ClassVar[str] = "passed"
    recalls: ClassVar[bool] = True
    stops: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """The input, nested as the output would be."""
        return entering(call, slot.get(call))

    @property
    def hollow(self) -> bool:
        """Always."""
        return True

    def fresh(self) -> Decision:
        """Run and keep."""
        return KeepChange(self.home)


def entering(call: Call, like: Output) -> Output:
    """The features that enter a block, nested as its output is.

    Args:
        call: of the block.
        like: its output, or a change of it: a tensor, a tuple of one, or the two streams text and image, which the
            blocks of all families return in this order.
    """
    if isinstance(like, Tensor):
        return call.tokens
    return (call.tokens,) if len(like) == 1 else (call.kwargs["encoder_hidden_states"], call.tokens)


def plus(left: Output, right: Output) -> Output:
    """The sum of two nested values; where one of them lacks a stream, the other one's."""
    if isinstance(left, tuple):
        return tuple(plus(a, b) for a, b in zip(left, right, strict=True))
    if left is None or right is None:
        return right if left is None else left
    return left + right


def minus(output: Output, entered: Output) -> Output:
    """Output minus input, nested; nothing for a stream that ends in this block."""
    if isinstance(output, tuple):
        return tuple(minus(a, b) for a, b in zip(output, entered, strict=True))
    return None if output is None else output - entered
