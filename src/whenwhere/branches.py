"""Decisions about guidance branches: average them into memory, run one of them only."""

from dataclasses import dataclass
from typing import ClassVar

from .anatomy import Role
from .decision import Call, Compute, Decision, Keep, Output, Slot, map_tensors
from .layout import Branches, repeat_rows, take_rows


def _mean(output: Output, branches: Branches | None) -> Output:
    if branches is None or len(branches.roles) == 1:
        return output
    return map_tensors(output, branches.mean)


# Equation 6 of T-GATE: F = (C_unconditional + C_conditional) / 2, for every sample.
branch_mean = Keep("branch mean", _mean, rows=lambda branches: 1, folds=True)  # noqa: ARG005


def _one(role: Role) -> Keep:
    def of(output: Output, branches: Branches | None) -> Output:
        if branches is None or len(branches.roles) == 1:
            return output
        rows = branches.rows_of(role)
        # A copy, so that the rows of the other branch are not held alive.
        return map_tensors(output, lambda tensor: tensor[rows].clone())

    return Keep(f"{role} branch", of, rows=lambda branches: 1, folds=True)  # noqa: ARG005


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
        rows, total = branches.rows_of(self.role or branches.survivor), branches.samples * len(branches.roles)
        kwargs = {
            name: take_rows(value, rows, total) if name in branches.arguments else value
            for name, value in call.kwargs.items()
        }
        return repeat_rows(call.forward(**kwargs), len(branches.roles))

    def inner_branches(self, branches: int) -> int:  # noqa: ARG002
        """One."""
        return 1

    def inner_layout(self, branches: Branches) -> Branches:
        """The surviving branch alone."""
        return branches if len(branches.roles) == 1 else branches.alone(self.role or branches.survivor)


# Two separate guidance calls: the second is answered with what the first returned.
first_call = Compute(Keep("first call", lambda output, _: output, rows=lambda branches: branches), shared=True)
