"""Sketches of what attention puts out, small enough to be remembered from step to step and compared.

An output, averaged over the guidance branches, is projected onto a few fixed random directions; the distance of two
such sketches, divided by the length of the later one, is its relative change (Johnson and Lindenstrauss, 1984:
projections keep distances).
"""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from ..decision import Call, Compute, Decision, Keep, Output, Slot, map_tensors
from ..layout import Branches
from ..pricing.unit import Macs, Unit

_DIRECTIONS = 8


def _mean(sketches: Output, branches: Branches | None) -> Output:
    return sketches if branches is None else map_tensors(sketches, branches.mean)


# What is done with sketches of all rows once it is known which rows are which branch.
_SKETCHED = Keep("sketch", _mean, size=lambda _parts, _branches: 0, folds=True)


@dataclass(frozen=True, slots=True)
class Sketch(Decision):
    """Run a cross-attention and remember a sketch of its output, (B, N, 8).

    Attributes:
        branches: guidance branches of the batch.
    """

    branches: int

    symbol: ClassVar[str] = "#"
    name: ClassVar[str] = "computed"

    def apply(self, call: Call, slot: Slot) -> Output:
        """Run, remember."""
        output = call.run()
        slot.put((_SKETCHED.of(sketch(output), call.branches),), call, _SKETCHED.folds_by(call.branches))
        if call.branches is None:
            slot.memory.unsettled.append((slot, _SKETCHED, call))
        return output

    @property
    def keeps(self) -> bool:
        """Always."""
        return True

    def bare(self) -> Decision:
        """Run the module, nothing else."""
        return Compute()

    def held_bytes(self, unit: Unit, branches: int, samples: int) -> int:  # noqa: ARG002
        """One branch's."""
        return _tokens(unit) * _DIRECTIONS * unit.itemsize * samples

    def extra(self, unit: Unit, samples: int) -> Macs:
        """The projection of every row."""
        spent = sum(unit.bytes) // unit.itemsize * _DIRECTIONS * self.branches * samples
        return Macs(spent, spent)


def sketch(output: Tensor) -> Tensor:
    """(n, N, D) -> (n, N, 8)."""
    return torch.matmul(output, _directions(output.shape[-1], output.dtype, output.device))


@cache
def _directions(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fixed random signs, (D, 8)."""
    drawn = torch.randint(2, (width, _DIRECTIONS), generator=torch.Generator().manual_seed(0))
    return (2 * drawn - 1).to(device, dtype)


def change(now: Tensor, before: Tensor, samples: int) -> Tensor:
    """||now - before|| / ||now|| of every sample, (B,)."""
    present, past = (sketch.float().reshape(samples, -1) for sketch in (now, before))
    length: Tensor = present.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    share: Tensor = (present - past).norm(dim=1) / length
    return share


def _tokens(unit: Unit) -> int:
    """Tokens that ask, in all rows that one row of the denoiser's batch has."""
    assert unit.attended is not None
    return unit.attended.queries * unit.attended.rows
