"""The decisions of guidance in joint attention, and their cost: the negative text's stream, and the guidance."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..decision import Call, Output, Slot
from ..pricing.unit import Macs, Unit
from ..taps import Forward, Tap, tapped
from .cross import conditional_rows
from .edits import Edit, Guided, Tally
from .network import Projected, network_of
from .provide import Given
from .streams import Companion, SingleBlock, block_of
from .text import Size, spread


@dataclass(frozen=True, slots=True)
class Accompany(Given):
    """Send the negative text through the denoiser beside the positive one."""

    size: Size
    pooled: bool

    def run(self, call: Call, text: Projected) -> Output:
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

    def extra(self, unit: Unit, samples: int) -> Macs:
        """The time embedding of the negative pooled vector."""
        return unit.part("time_text_embed").times(samples) if self.pooled else Macs()


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
class Beside(Guided):
    """Run a block for the negative text too."""

    size: Size

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
class GuideJoint(Guided):
    """Guide the conditional image tokens of a joint attention."""

    edit: Edit

    def apply(self, call: Call, slot: Slot) -> Output:  # noqa: ARG002
        """Tell the block how, run."""
        companion: Companion = call.notes["companion"]
        block = companion.block
        if block is None:
            raise RuntimeError(f"{call.site} was called outside its block, so nothing can be guided.")
        tally = Tally.at(call, companion.rows.stop - companion.rows.start)
        block.guide = lambda positive, negative: self.edit(positive, negative, tally)
        output = call.run()
        return block.guided(output) if isinstance(block, SingleBlock) else output
