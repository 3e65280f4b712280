"""Decisions about guidance branches: average them into memory, keep them apart, run one of them only.

The branches are rows of one batch, or separate calls of the denoiser, one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..anatomy import Role
from ..clock import Step
from ..decision import Call, Compute, Decision, Keep, Output, Reuse, Slot, map_tensors, whole
from ..layout import Branches, repeat_rows, take_rows


def _one_row(parts: Sequence[int], _branches: int) -> int:
    return sum(parts)


def _mean(output: Output, branches: Branches | None) -> Output:
    if branches is None or len(branches.roles) == 1:
        return output
    return map_tensors(output, branches.mean)


# Equation 6 of T-GATE: F = (C_unconditional + C_conditional) / 2, for every sample.
branch_mean = Keep("branch mean", _mean, size=_one_row, folds=True)


def _one(role: Role) -> Keep:
    def of(output: Output, branches: Branches | None) -> Output:
        if branches is None or len(branches.roles) == 1:
            return output
        # A copy, so that the rows of the other branch are not held alive.
        return map_tensors(output, lambda tensor: tensor[branches.rows_of(role, tensor.shape[0])].clone())

    return Keep(f"{role} branch", of, size=_one_row, folds=True)


conditional_branch = _one(Role.CONDITIONAL)
unconditional_branch = _one(Role.UNCONDITIONAL)


def _each(output: Output, branches: Branches | None) -> Output:
    if branches is None:
        return output
    several = len(branches.roles) > 1

    def of(role: Role) -> Output:
        return map_tensors(output, lambda t: t[branches.rows_of(role, len(t))].clone() if several else t)

    return {role: of(role) for role in branches.roles}


# A dictionary of the output's rows by the role of their branch.
each_branch = Keep("each branch", _each, size=lambda parts, branches: branches * sum(parts), folds=True)


@dataclass(frozen=True, slots=True)
class ReuseAcross(Decision):
    """Return what was kept of a batch that may have had more branches than the present one.

    Attributes:
        keep: `each_branch`, of which those are returned that are present; or what makes one branch of all, which is
            returned for every branch.
        shared: whether the slot is the same in every pass.
    """

    keep: Keep
    shared: bool = False

    symbol: ClassVar[str] = "."
    name: ClassVar[str] = Reuse.name
    recalls: ClassVar[bool] = True
    stops: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """Recall one branch, or its own for every branch, and put them one below the other."""
        roles = (Role.CONDITIONAL,) if call.branches is None else call.branches.roles
        value = slot.get(replace(call, args=(call.tokens[: len(call.tokens) // len(roles)],)))
        rows = [value[role] for role in roles] if self.keep is each_branch else [value] * len(roles)
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def fresh(self) -> Decision:
        """Run and keep."""
        return Compute(self.keep, self.shared)


@dataclass(frozen=True, slots=True)
class OneBranch(Decision):
    """Run the denoiser on one branch and give its prediction for all of them.

    Guidance combines u + s (c - u); with u = c this is u, bit for bit, so the pipeline's own loop needs no change.

    Attributes:
        role: the branch that runs; `None` for the one the family goes on with (see `Anatomy.survivor`).
    """

    role: Role | None = None

    symbol: ClassVar[str] = "/"
    name: ClassVar[str] = "one guidance branch"

    def apply(self, call: Call, slot: Slot) -> Output:  # noqa: ARG002
        """Slice every argument that holds rows, run, repeat the output."""
        branches = call.branches
        if branches is None or len(branches.roles) == 1:
            return call.run()
        total = branches.samples * len(branches.roles)
        rows = branches.rows_of(self.role or branches.survivor, total)
        kwargs = {
            name: take_rows(value, rows, total) if name in branches.arguments else value
            for name, value in call.kwargs.items()
        }
        return repeat_rows(call.forward(**kwargs), len(branches.roles))

    def inner_branches(self, branches: int) -> int:  # noqa: ARG002
        """One."""
        return 1

    def inner_layout(self, branches: Branches) -> Branches:
        """The surviving branch alone.

        Raises:
            ValueError: the batch has rows for perturbed-attention guidance, whose attention processors count on them.
        """
        if Role.PERTURBED in branches.roles:
            raise ValueError(
                "perturbed-attention guidance splits its batch inside the attention, so no branch can run alone; "
                "run this pipeline without pag_scale, or with methods that leave the branches as they are."
            )
        return branches if len(branches.roles) == 1 else branches.alone(self.role or branches.survivor)


# Two separate guidance calls: the second is answered with what the first returned.
first_call = Compute(whole, shared=True)
second_call = Reuse(whole, shared=True)


def drop_guidance(step: Step, role: Role | None = None) -> Decision:
    """One branch for all: of a batch that of this role (see `OneBranch`), of separate calls the first."""
    if step.branches > 1:
        return OneBranch(role)
    return first_call if step.pass_ == 0 else second_call


@dataclass(frozen=True, slots=True)
class JoinMean(Decision):
    """Run in the second of two separate guidance calls; remember the mean with what the first one left."""

    shared: bool = True

    symbol: ClassVar[str] = "#"
    name: ClassVar[str] = "computed"
    recalls: ClassVar[bool] = True
    neutral: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """Run; average."""
        output = call.run()
        slot.put(output if slot.empty else torch.stack([slot.get(call), output]).mean(0), call)
        return output

    @property
    def keeps(self) -> bool:
        """Always."""
        return True

    def bare(self) -> Decision:
        """Run the module, nothing else."""
        return Compute()

    def kept_bytes(self, parts: Sequence[int], branches: int) -> int:
        """One row."""
        return _one_row(parts, branches)


def keep_of_both(keep: Keep, step: Step) -> Decision | None:
    """Run, and keep what is made of both guidance branches: in a batch, or in a slot that separate calls share.

    Raises:
        ValueError: there are more than two separate calls.
    """
    if step.branches > 1:
        return Compute(keep, shared=True)
    if step.pass_ > 1:
        raise ValueError(f"there are two guidance branches, but the denoiser is called {step.pass_ + 1} times a step.")
    if step.pass_ == 0 or keep is unconditional_branch:  # without guidance the first call is all there is
        return Compute(keep, shared=True)
    return JoinMean() if keep is branch_mean else None


def reuse_of_both(keep: Keep) -> Decision:
    """Return what `keep_of_both` kept, in one slot for all calls: the first step may not know how many there are."""
    return Reuse(keep, shared=True)
