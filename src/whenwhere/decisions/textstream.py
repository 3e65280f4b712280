"""Decisions that stop the text's stream through a transformer in which text and image share one attention.

There the image attends to keys and values of the text that every block makes anew, from a stream of its own. If they
are kept, nothing of that stream is needed any more: its projections, its output and its MLP are left out, and image
queries attend to the present image and to the text as it was. Projections are tapped for the length of one call, so no
block and no processor is copied. Text tokens still ask in the attention, to no purpose: its two products are spent.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..anatomy import Role
from ..decision import Call, Compute, Decision, Output, Slot
from ..pricing.unit import Macs, Unit
from ..taps import tapped
from .branches import each_branch
from .texttaps import frozen, noted, once

_ALONE = "computed for the image alone"


@dataclass(frozen=True, slots=True)
class KeepText(Decision):
    """Run a joint attention and keep the text's keys and values, (R, T, D) each, of every guidance branch."""

    symbol: ClassVar[str] = "#"
    name: ClassVar[str] = "computed"

    def apply(self, call: Call, slot: Slot) -> Output:
        """Run, remember."""
        kept: dict[str, Tensor] = {}
        with tapped(noted(_attention(call), kept, call.notes)):
            output = call.run()
        slot.put(each_branch.of(kept, call.branches), call, each_branch.folds_by(call.branches))
        if call.branches is None:
            slot.memory.unsettled.append((slot, each_branch, call))
        return output

    @property
    def keeps(self) -> bool:
        """Always."""
        return True

    def bare(self) -> Decision:
        """Run, nothing else."""
        return Compute()

    def held_bytes(self, unit: Unit, branches: int, samples: int) -> int:
        """Keys and values; with fused projections the queries too."""
        assert unit.attended is not None
        fused = any(name in unit.parts for name in ("to_added_qkv", "to_qkv"))
        return (3 if fused else 2) * unit.attended.text * unit.attended.width * unit.itemsize * branches * samples


@dataclass(frozen=True, slots=True)
class FrozenText(Decision):
    """Run a joint attention for the image, with the keys and values of the text that are kept."""

    symbol: ClassVar[str] = "i"
    name: ClassVar[str] = _ALONE
    recalls: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """Recall, run."""
        roles = (Role.CONDITIONAL,) if call.branches is None else call.branches.roles
        value = slot.get(replace(call, args=(call.tokens[: len(call.tokens) // len(roles)],)))
        kept = {name: torch.cat([value[role][name] for role in roles]) for name in value[roles[0]]}
        with tapped(frozen(_attention(call), kept)):
            return call.run()

    def fresh(self) -> Decision:
        """Run and keep."""
        return KeepText()

    def saved(self, unit: Unit) -> Macs:
        """The text's projections."""
        own = unit.part("add_q_proj", "add_k_proj", "add_v_proj", "to_added_qkv", "to_add_out")
        return own if own.all else _text_share(unit, "to_q", "to_k", "to_v", "to_qkv")


@dataclass(frozen=True, slots=True)
class LeaveOut(Decision):
    """Give nothing instead of running the text's MLP: zeros that occupy one number."""

    symbol: ClassVar[str] = "-"
    name: ClassVar[str] = "left out"
    stops: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:  # noqa: ARG002
        """The input's shape is the output's."""
        return call.tokens.new_zeros(()).expand(call.tokens.shape)


@dataclass(frozen=True, slots=True)
class TextBlock(Decision):
    """Run a block and tell its attention how many tokens are text.

    Attributes:
        alone: whether the text is left out of it.
    """

    alone: bool

    name: ClassVar[str] = _ALONE

    @property
    def symbol(self) -> str:  # type: ignore[override]
        """As the attention inside."""
        return FrozenText.symbol if self.alone else Compute.symbol

    def apply(self, call: Call, slot: Slot) -> Output:  # noqa: ARG002
        """Run."""
        assert call.module is not None
        text = call.notes["text"] = int(call.kwargs["encoder_hidden_states"].shape[1])
        call.notes["tokens"] = text + call.tokens.shape[1]
        if not self.alone:
            return call.run()
        with tapped({call.module.get_submodule("attn"): once(call)}):
            return call.run()


@dataclass(frozen=True, slots=True)
class ImageOnly(Decision):
    """Run what serves both streams on the image's tokens alone; the text's before them become zeros."""

    symbol: ClassVar[str] = FrozenText.symbol
    name: ClassVar[str] = _ALONE

    def apply(self, call: Call, slot: Slot) -> Output:  # noqa: ARG002
        """Cut the text off, run, put zeros in its place."""
        text, count = call.notes["text"], call.tokens.shape[1]
        if count != call.notes["tokens"]:
            raise ValueError(
                f"{call.method}: another method gives {count} of {call.notes['tokens']} tokens to {call.site}, and "
                f"nobody knows which are text; let it end before step {call.step.index}."
            )
        image: Tensor = call.forward(call.tokens[:, text:])
        return torch.cat([image.new_zeros(len(image), text, image.shape[-1]), image], 1)

    def saved(self, unit: Unit) -> Macs:
        """The text's share."""
        sizes = unit.attended
        return unit.macs.times(sizes.text / sizes.queries) if sizes else Macs()


def _attention(call: Call) -> Any:
    return call.module


def _text_share(unit: Unit, *names: str) -> Macs:
    """The share of projections of both streams that is the text's."""
    sizes = unit.attended
    return unit.part(*names).times(sizes.text / sizes.queries) if sizes else Macs()
