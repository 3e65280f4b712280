"""Decisions that watch cross-attention converge, and close a gate when it has, for every sample by itself.

What a cross-attention puts out is sketched at every step of the window, and compared with the step before. The change
times the number of steps is a rate, which does not depend on that number. A sample's gate closes when the mean rate of
all cross-attentions is small. In a batch, the gates close one by one: what a closed sample puts out is that of its own
frozen run, whatever the others do, but its branch is saved only when all gates are closed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..decision import Call, Compute, Decision, Output, Reuse, Slot, map_tensors
from ..layout import Branches
from ..pricing.unit import Macs, Unit
from .sketches import Sketch, change, sketch


@dataclass(frozen=True, slots=True)
class Watch(Decision):
    """Run a cross-attention; remember its branches' mean, and note its change since the last step for every sample.

    Attributes:
        branches: guidance branches of the batch.
        judged: whether the change matters.
        keep: whether anything is remembered.
    """

    branches: int
    judged: bool = True
    keep: bool = True

    symbol: ClassVar[str] = "#"
    name: ClassVar[str] = "computed"
    recalls: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """Run; give closed samples what is frozen for them; sketch, compare, remember."""
        output, branches = call.run(), call.branches
        assert branches is not None  # known after the first step
        before, *frozen = slot.get(_of_one_branch(call, branches))
        mean = branches.mean(output)
        closed = _closed(call)
        if closed and frozen:
            mean = _put_samples(mean, frozen[0], closed, branches.samples)
            repeated = torch.cat([mean] * len(branches.roles))
            output = _put_samples(output, repeated, closed, branches.samples, len(branches.roles))
        if self.keep:
            made = branches.mean(sketch(output))
            if self.judged:
                call.notes.setdefault("changing", []).append(change(made, before, branches.samples))
            slot.put((made, mean), call, len(branches.roles))
        return output

    @property
    def keeps(self) -> bool:
        """Unless no later step recalls."""
        return self.keep

    def bare(self) -> Decision:
        """Without remembering; what is frozen already is still recalled."""
        return replace(self, keep=False)

    def fresh(self) -> Decision:
        """Without a step before, only the sketch."""
        return Sketch(self.branches)

    def held_bytes(self, unit: Unit, branches: int, samples: int) -> int:
        """The mean, and the sketch."""
        return sum(unit.bytes) * samples + Sketch(self.branches).held_bytes(unit, branches, samples)

    def extra(self, unit: Unit, samples: int) -> Macs:
        """The projection of every row."""
        return Sketch(self.branches).extra(unit, samples) if self.keep else Macs()


@dataclass(frozen=True, slots=True)
class Frozen(Decision):
    """Return what is frozen instead of running the cross-attention."""

    branches: int

    symbol: ClassVar[str] = Reuse.symbol
    name: ClassVar[str] = Reuse.name
    recalls: ClassVar[bool] = True
    stops: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """Recall."""
        return slot.get(call)[-1]

    def fresh(self) -> Decision:
        """Without anything frozen, run."""
        return Compute()


@dataclass(frozen=True, slots=True)
class Undecided(Decision):
    """Run the denoiser while gates are open; then close those of the samples whose cross-attention has converged.

    Attributes:
        judged: whether gates may close after this step.
        final: whether all close.
    """

    judged: bool
    final: bool

    symbol: ClassVar[str] = "?"
    name: ClassVar[str] = "computed, the gate may close"

    def apply(self, call: Call, slot: Slot) -> Output:  # noqa: ARG002
        """Run, give closed samples the prediction of the branch that goes on, judge."""
        output = call.run()
        branches = call.branches
        samples = branches.samples if branches else len(call.tokens)
        closed = _closed(call)
        if closed and branches and len(branches.roles) > 1:
            output = map_tensors(output, lambda t: _give_the_survivor(t, closed, branches))
        if self.judged:
            _judge(call, samples, self.final)
        return output


def _judge(call: Call, samples: int, final: bool) -> None:
    """Note the changes of this step, and close gates; the only place where the device is waited for."""
    gates: list[int | None] = call.notes.setdefault("gates", [None] * samples)
    changing = call.notes.pop("changing", None)
    changes: list[float] = torch.stack(changing).mean(0).tolist() if changing else [float("inf")] * samples
    rates = tuple(change * call.step.count for change in changes)
    call.notes.setdefault("rates", {})[call.step.index] = rates
    for i, rate in enumerate(rates):
        if gates[i] is None and (final or rate <= call.method.threshold):
            gates[i] = call.step.index + 1


def all_closed(notes: Any, step: int) -> bool:
    """Whether the gates of all samples are closed at a step; one that closes does so for the steps to come."""
    gates = notes.get("gates")
    return bool(gates) and all(gate is not None and gate <= step for gate in gates)


def _closed(call: Call) -> list[int]:
    gates = enumerate(call.notes.get("gates", ()))
    return [i for i, gate in gates if gate is not None and gate <= call.step.index]


def _of_one_branch(call: Call, branches: Branches) -> Call:
    return replace(call, args=(call.tokens[: len(call.tokens) // len(branches.roles)],))


def _put_samples(into: Tensor, given: Tensor, chosen: Sequence[int], samples: int, branches: int = 1) -> Tensor:
    """A tensor with the rows of some samples, in all branches, taken from another: (branches * n, ...)."""
    changed = into.reshape(branches, samples, -1, *into.shape[1:]).clone()
    changed[:, chosen] = given.reshape(changed.shape)[:, chosen]
    return changed.reshape(into.shape)


def _give_the_survivor(prediction: Tensor, closed: Sequence[int], branches: Branches) -> Tensor:
    """A prediction in which all branches of closed samples have that of the branch that goes on."""
    survivor = prediction[branches.rows_of(branches.survivor, len(prediction))]
    repeated = torch.cat([survivor] * len(branches.roles))
    return _put_samples(prediction, repeated, closed, branches.samples, len(branches.roles))
