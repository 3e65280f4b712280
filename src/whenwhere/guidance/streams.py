"""The negative text's stream through a transformer in which text and image share one attention.

The image has one stream, guided; every text has its own. A block is run for the positive text as usual, and once more
for the negative text with an image of no tokens at all: norms, projections and MLP then work on the text alone. Only in
the attention the image takes part, by the queries, keys and values it has in the first run. So no block and no
processor is copied, and the image's share is computed once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..decision import Call, Output
from ..taps import Forward, Tap, projections, tapped
from .cross import named_arguments, put_rows


@dataclass(slots=True)
class Companion:
    """The negative text during one call of the denoiser.

    Attributes:
        rows: the conditional rows of the batch.
        tokens: (B, T, D), what became of the text so far.
        embedded: (B, D), its time embedding; `None` where it is the positive one's.
        rotary: the rotary embedding of its tokens and the image's.
        block: the block that is running.
        visited, blocks: how many blocks it came through, of how many.
    """

    rows: slice
    tokens: Tensor
    embedded: Tensor | None = None
    rotary: Any = None
    block: "Block | None" = None
    visited: int = 0
    blocks: int = 0


class Block(ABC):
    """One call of a block that is run for a second text."""

    def __init__(self, call: Call, companion: Companion) -> None:
        assert call.module is not None
        self.call, self.companion, self.rows = call, companion, companion.rows
        self.module = call.module
        self.attn: Any = call.module.get_submodule("attn")
        self.named = named_arguments(call)
        self.guide: Callable[[Tensor, Tensor], Tensor] | None = None  # set by the decision at the attention
        self._second = False
        self._seen: dict[str, Any] = {}  # outputs of the first run, for the whole batch
        self._negative: Tensor | None = None

    @abstractmethod
    def taps(self) -> dict[nn.Module, Tap]:
        """What is tapped while the block runs."""

    def run(self) -> Output:
        """Run for both texts; the output is that of the first."""
        self.companion.block = self
        self.companion.visited, self.companion.blocks = self.companion.visited + 1, self.call.site.count
        try:
            with tapped(self.taps()):
                output = self.call.run()
                self.negative()
        finally:
            self.companion.block = None
        return output

    def negative(self) -> Tensor:
        """Z- of the image's queries, (B, N, D); the first time it is asked for, the block runs for the second text."""
        if self._negative is None:
            companion = self.companion
            tokens, embedded = self.named["hidden_states"][self.rows], companion.embedded
            second = {
                "hidden_states": tokens[:, :0],
                "encoder_hidden_states": companion.tokens,
                "temb": self.named["temb"][self.rows] if embedded is None else embedded,
            }
            if companion.rotary is not None:
                second["image_rotary_emb"] = companion.rotary
            self._second = True
            try:
                assert self.call.alone is not None
                companion.tokens = self.call.alone(**self.named | second)[0]
            finally:
                self._second = False
        assert self._negative is not None
        return self._negative

    def remember(self, name: str) -> Tap:
        """A tap that keeps what the first run computed, and hands the conditional rows of it to the second."""

        def tap(original: Forward) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if not self._second:
                    self._seen[name] = original(*args, **kwargs)
                    return self._seen[name]
                return self.recall(name, original, *args, **kwargs)

            return forward

        return tap

    @abstractmethod
    def recall(self, name: str, original: Forward, *args: Any, **kwargs: Any) -> Any:
        """What a remembered module puts out in the second run."""


class DoubleBlock(Block):
    """A block with separate weights for text and image (SD3, Flux)."""

    def taps(self) -> dict[nn.Module, Tap]:
        """The image's norm and projections, its output projection, and its attention to itself where it has one."""
        found = projections(self.attn, "to_q", "to_k", "to_v", "to_qkv")
        found["norm1"] = self.module.get_submodule("norm1")
        taps = {module: self.remember(name) for name, module in found.items()}
        taps[self.attn.to_out[0]] = self._tap_output
        own = getattr(self.module, "attn2", None)
        return taps if own is None else {**taps, own: self._tap_own}

    def recall(self, name: str, original: Forward, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Conditional rows of the first run. Of the norm only its first output is image that meets the text."""
        if name == "norm1":
            normed, *others = self._seen[name]
            return normed[self.rows], *(o[self.rows][:, :0] if o.ndim == 3 else o[self.rows] for o in others)
        if name not in self._seen:  # the attention was not run, but reused
            return original(*args)
        return self._seen[name][self.rows]

    def _tap_output(self, original: Forward) -> Forward:
        def forward(attended: Tensor) -> Tensor:
            if self._second:
                self._negative = attended
                return attended.new_zeros(len(attended), 0, self.attn.out_dim)
            if self.guide is None:
                return original(attended)  # type: ignore[no-any-return]
            guided = self.guide(attended[self.rows], self.negative())
            return original(put_rows(attended, self.rows, guided))  # type: ignore[no-any-return]

        return forward

    def _tap_own(self, original: Forward) -> Forward:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return hidden_states if self._second else original(hidden_states, *args, **kwargs)

        return forward


class SingleBlock(Block):
    """A block with one set of weights for text and image in a row (Flux); its attention does not project."""

    def taps(self) -> dict[nn.Module, Tap]:
        """Projections, and the attention as a whole."""
        found = projections(self.attn, "to_q", "to_k", "to_v", "to_qkv")
        found["norm"] = self.module.get_submodule("norm")
        return {module: self.remember(name) for name, module in found.items()} | {self.attn: self._tap_attention}

    @property
    def text(self) -> int:
        """Tokens of the positive text."""
        return int(self.named["encoder_hidden_states"].shape[1])

    def recall(self, name: str, original: Forward, *args: Any, **kwargs: Any) -> Any:
        """The text computed, the image from the first run."""
        if name == "norm":
            return original(*args, **kwargs)
        image = self._seen.get(name)
        if image is None:  # the attention was not run, but reused
            image = original(self._seen["norm"][0])
        return torch.cat([original(*args), image[self.rows][:, self.text :]], 1)

    def guided(self, output: Tensor) -> Tensor:
        """The output of the attention with the conditional image tokens guided."""
        assert self.guide is not None
        text, image = output[self.rows].tensor_split([self.text], 1)
        return put_rows(output, self.rows, torch.cat([text, self.guide(image, self.negative())], 1))

    def _tap_attention(self, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            if not self._second:
                return output
            text = self.companion.tokens.shape[1]
            self._negative = output[:, text:]
            return output[:, :text]

        return forward


def block_of(call: Call, companion: Companion) -> Block:
    """The kind of block that a call is of."""
    assert call.module is not None
    kind = DoubleBlock if hasattr(call.module, "norm1_context") else SingleBlock
    return kind(call, companion)
