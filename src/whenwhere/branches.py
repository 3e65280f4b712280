"""Decisions about guidance branches: average them into memory, run one of them only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .anatomy import Role
from .decision import Call, Compute, Decision, Keep, Output, Reuse, Slot, map_tensors, whole
from .layout import Branches, repeat_rows, take_rows


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
