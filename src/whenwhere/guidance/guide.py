"""The decisions of guidance in cross-attention, and their cost."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..decision import Call, Decision, Output, Slot
from ..pricing.unit import Macs, Unit
from .cross import Twice
from .edits import Edit, Guided, Tally
from .text import Size


@dataclass(frozen=True, slots=True)
class Guide(Guided):
    """Guide the conditional rows of a cross-attention with remembered keys and values of the negative text."""

    edit: Edit
    size: Size

    recalls: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """Recall, run."""
        return guided(call, self.edit, slot.value)[0]

    def fresh(self) -> Decision:
        """Make the keys and values."""
        return GuideAnew(self.edit, self.size)

    def extra(self, unit: Unit, samples: int) -> Macs:
        """A second attention for every conditional row; with images a third, of its text alone.

        A picture is one token of zeros in both.
        """
        sizes = unit.attended
        assert sizes is not None
        picture = any(path in ("add_k_proj", "to_added_kv") for path in unit.parts)
        images = picture or any(path.startswith("processor.to_k_ip") for path in unit.parts)
        tokens = self.size.tokens_beside(sizes.text) + images * sizes.text + 2 * picture
        return Macs(all=2 * sizes.queries * tokens * sizes.width * sizes.rows * samples)


@dataclass(frozen=True, slots=True)
class GuideAnew(Guided):
    """Guide, and remember the keys and values of the negative text."""

    edit: Edit
    size: Size
    keep: bool = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """Run, keep."""
        output, keys = guided(call, self.edit, None)
        if self.keep:
            slot.put(keys, call)
        return output

    @property
    def keeps(self) -> bool:
        """Whether a later step wants the keys and values."""
        return self.keep

    def bare(self) -> Decision:
        """Without keeping."""
        return GuideAnew(self.edit, self.size, keep=False)

    def held_bytes(self, unit: Unit, branches: int, samples: int) -> int:  # noqa: ARG002
        """Keys and values, (R, T, D) each."""
        sizes = unit.attended
        assert sizes is not None
        tokens = self.size.tokens_beside(sizes.text)
        return 2 * self.size.rows_for(samples) * tokens * sizes.width * unit.itemsize

    def extra(self, unit: Unit, samples: int) -> Macs:
        """Besides the attention the projections of the negative text, once for every row of it."""
        sizes = unit.attended
        assert sizes is not None
        made = self.size.rows_for(samples) * self.size.tokens_beside(sizes.text) / (sizes.text * sizes.rows)
        return Guide(self.edit, self.size).extra(unit, samples) + unit.part("to_k", "to_v", "to_kv").times(made)


def guided(call: Call, edit: Edit, keys: dict[str, Tensor] | None) -> tuple[Output, dict[str, Tensor]]:
    """Run a cross-attention guided; gives its output, and the keys and values of the negative text."""
    tally = Tally.at(call, call.branches.samples if call.branches else 0)
    twice = Twice(
        call, call.notes["text"], {**(keys or {})}, lambda positive, negative: edit(positive, negative, tally)
    )
    return twice.run(), twice.keys
