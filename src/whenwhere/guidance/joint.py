"""The decisions of guidance in joint attention, and their cost: the negative text's stream, and the guidance."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..decision import Call, Decision, Output, Slot
from ..pricing.unit import Macs, Unit
from ..taps import Forward, Tap, tapped
from .cross import conditional_rows
from .edits import Edit, Tally
from .network import network_of
from .provide import ProvideAnew, projected
from .streams import Companion, SingleBlock, block_of
from .text import Size, spread


@dataclass(frozen=True, slots=True)
class Accompany(Decision):
    """Send the negative text through the denoiser beside the positive one; how it was projected is remembered."""

    size: Size
    pooled: bool

    symbol: ClassVar[str] = "g"
    name: ClassVar[str] = "guided away from the negative text"
    recalls: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """Recall, run."""
        return accompanied(call, slot.value)

    def fresh(self) -> Decision:
        """Project it."""
        return AccompanyAnew(self.size, self.pooled)

    def extra(self, unit: Unit, samples: int) -> Macs:
        """The time embedding of the negative pooled vector."""
        return unit.part("time_text_embed").times(samples) if self.pooled else Macs()


@dataclass(frozen=True, slots=True)
class AccompanyAnew(Decision):
    """The same, and remember the text as it was projected."""

    size: Size
    pooled: bool
    keep: bool = True

    symbol: ClassVar[str] = "g"
    name: ClassVar[str] = Accompany.name

    def apply(self, call: Call, slot: Slot) -> Output:
        """Project, keep, run."""
        text = projected(call)
        if self.keep:
            slot.put(text, call)
        return accompanied(call, text)

    @property
    def keeps(self) -> bool:
        """Whether a later step wants it."""
        return self.keep

    def bare(self) -> Decision:
        """Without keeping."""
        return AccompanyAnew(self.size, self.pooled, keep=False)

    def held_bytes(self, unit: Unit, branches: int, samples: int) -> int:
        """The text."""
        return ProvideAnew(self.size).held_bytes(unit, branches, samples)

    def extra(self, unit: Unit, samples: int) -> Macs:
        """The projection, and the time embedding."""
        again = Accompany(self.size, self.pooled).extra(unit, samples)
        return ProvideAnew(self.size).extra(unit, samples) + again


def accompanied(call: Call, text: Any) -> Output:
    """Run the denoiser with a companion in the method's notes."""
    rows = conditional_rows(call, len(call.tokens))
    companion = Companion(rows, spread(text[0], rows.stop - rows.start))
    call.notes["companion"] = companion
    try:
        with tapped(dict(_embeddings(call, companion))):
            output = call.run()
    finally:
        del call.notes["companion"]
    if companion.visited != companion.blocks:
        skipped = companion.blocks - companion.visited
        raise ValueError(
            f"{call.method}: another method skipped {skipped} of {companion.blocks} blocks in "
            f"step {call.step.index}, through which the negative text must go; keep their windows apart."
        )
    return output


def _embeddings(call: Call, companion: Companion) -> Iterator[tuple[nn.Module, Tap]]:
    """What the denoiser embeds before its blocks, and must embed for the negative text too."""
    assert call.module is not None
    text, tokens = call.method.text, companion.tokens
    network = network_of(call.module)
    if "pooled" in network.arguments and text is not None and text.pooled is not None:
        pooled = spread(text.to(call.tokens).pooled, len(tokens))
        yield call.module.get_submodule("time_text_embed"), _tap_time(companion, pooled)
    if network.rotary:
        positive = call.kwargs["encoder_hidden_states"].shape[1]
        yield call.module.get_submodule("pos_embed"), _tap_positions(companion, positive)


def _tap_time(companion: Companion, pooled: Tensor) -> Tap:
    def tap(original: Forward) -> Forward:
        def forward(*args: Tensor) -> Any:
            companion.embedded = original(*(argument[companion.rows] for argument in args[:-1]), pooled)
            return original(*args)

        return forward

    return tap


def _tap_positions(companion: Companion, positive: int) -> Tap:
    def tap(original: Forward) -> Forward:
        def forward(ids: Tensor) -> Any:
            # All tokens of a text stand in one place: the first one's position serves a text of any length.
            text = ids[:1].expand(companion.tokens.shape[1], -1)
            companion.rotary = original(torch.cat([text, ids[positive:]]))
            return original(ids)

        return forward

    return tap


@dataclass(frozen=True, slots=True)
class Beside(Decision):
    """Run a block for the negative text too."""

    size: Size

    symbol: ClassVar[str] = "g"
    name: ClassVar[str] = Accompany.name

    def apply(self, call: Call, slot: Slot) -> Output:  # noqa: ARG002
        """Run for both."""
        return block_of(call, call.notes["companion"]).run()

    def extra(self, unit: Unit, samples: int) -> Macs:
        """The text's share of the block, and one attention of text and image."""
        sizes = unit.attended
        assert sizes is not None
        text = self.size.tokens_beside(sizes.text)
        single = "proj_mlp" in unit.parts
        image = sizes.queries - (sizes.text if single else 0)
        names = _OF_SINGLE if single else _OF_TEXT
        share = text / (sizes.queries if single else sizes.text)
        products = Macs(all=2 * (image + text) ** 2 * sizes.width * samples)
        return (
            unit.part("norm" if single else "norm1_context").times(samples)
            + unit.part(*names).times(share * samples)
            + products
        )


_OF_TEXT = (
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_added_qkv",
    "attn.to_add_out",
    "ff_context",
)
_OF_SINGLE = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_qkv", "proj_mlp", "proj_out")


@dataclass(frozen=True, slots=True)
class GuideJoint(Decision):
    """Guide the conditional image tokens of a joint attention."""

    edit: Edit

    symbol: ClassVar[str] = "g"
    name: ClassVar[str] = Accompany.name

    def apply(self, call: Call, slot: Slot) -> Output:  # noqa: ARG002
        """Tell the block how, run."""
        companion: Companion = call.notes["companion"]
        block, tally = companion.block, Tally.of(call.notes)
        if block is None:
            raise RuntimeError(f"{call.site} was called outside its block, so nothing can be guided.")
        tally.visit(call.site, call.step.index, companion.rows.stop - companion.rows.start)
        block.guide = lambda positive, negative: self.edit(positive, negative, tally)
        output = call.run()
        return block.guided(output) if isinstance(block, SingleBlock) else output
