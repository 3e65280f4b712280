"""The trace of a text: layers x tokens, as the table of a diffusion method is sites x steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .call import Knob
from .within import find, turned

COMPUTED, SKIPPED = "#", "."


@dataclass(frozen=True)
class TokenTrace:
    """Which tokens of a text the routed layers processed.

    Attributes:
        method: its name.
        layers: of the whole model; those without a row process every token.
        tokens: T, as they are written.
        rows: by routed layer, a character for every token, `#` computed and `.` skipped.
    """

    method: str
    layers: int
    tokens: tuple[str, ...]
    rows: Mapping[int, str]

    @property
    def depths(self) -> tuple[float, ...]:
        """By token, the share of the routed layers that processed it."""
        return tuple(column.count(COMPUTED) / len(column) for column in zip(*self.rows.values(), strict=True))

    @property
    def realised(self) -> dict[int, float]:
        """By routed layer, the share of the tokens that it processed."""
        return {layer: row.count(COMPUTED) / len(row) for layer, row in self.rows.items()}

    def lines(self, width: int = 100) -> str:
        """The text in lines, each above its rows; a row's characters stand under the tokens they belong to."""
        label = len(f"layer {max(self.rows)}") + 2
        blocks = []
        for first, last in self._breaks(width - label):
            shown = [_shown(token) for token in self.tokens[first:last]]
            block = [" " * label + "".join(shown)]
            for layer, row in self.rows.items():
                marks = "".join(_mark(token, mark) for token, mark in zip(shown, row[first:last], strict=True))
                block.append(f"layer {layer}".ljust(label) + marks)
            blocks.append("\n".join(line.rstrip() for line in block))
        return "\n\n".join(blocks)

    @property
    def legend(self) -> str:
        """What the characters mean, and what share was realised."""
        dense, mean = self.layers - len(self.rows), sum(self.depths) / len(self.tokens)
        return (
            f"{COMPUTED} computed   {SKIPPED} skipped   "
            f"{mean:.1%} of {len(self.tokens)} tokens in {len(self.rows)} routed layers; {dense} layers run for all"
        )

    def __str__(self) -> str:
        """The lines and the legend."""
        return f"{self.lines()}\n\n{self.legend}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "method": self.method,
            "layers": self.layers,
            "tokens": list(self.tokens),
            "rows": {str(layer): row for layer, row in self.rows.items()},
            "realised": {str(layer): share for layer, share in self.realised.items()},
        }

    def _breaks(self, width: int) -> list[tuple[int, int]]:
        """Where lines of so many characters begin and end."""
        breaks, first, used = [], 0, 0
        for place, token in enumerate(self.tokens):
            room = len(_shown(token))
            if place > first and used + room > width:
                breaks.append((first, place))
                first, used = place, 0
            used += room
        return [*breaks, (first, len(self.tokens))]


@torch.no_grad()
def trace(model: nn.Module, tokenizer: Any, text: str, knob: Knob | None = None) -> TokenTrace:
    """Run a text through a routed model in evaluation mode, and note what its layers processed.

    Args:
        model: routed.
        tokenizer: of the model.
        text: at least one token.
        knob: the trade of speed against quality; the model's own if not given.

    Raises:
        ValueError: the model is not routed, the text is empty, or nobody can decide: see the message.
    """
    routed = find(model)
    ids = tokenizer(text, return_tensors="pt").input_ids
    if not ids.shape[-1]:
        raise ValueError("the text has no tokens; write something to be traced.")
    training = routed.training
    routed.eval()
    try:
        with turned(routed, knob or routed.knob):
            routed(ids.to(routed.device), use_cache=False, logits_to_keep=1)
    finally:
        routed.train(training)
    rows = {
        index: "".join(COMPUTED if run else SKIPPED for run in note.mask[0].tolist())
        for index, note in sorted(routed.notes.items())
    }
    tokens = tuple(tokenizer.decode([number]) for number in ids[0].tolist())
    return TokenTrace(type(routed.routing).__name__, routed.config.num_hidden_layers, tokens, rows)


def _shown(token: str) -> str:
    """A token on one line, at least one character wide."""
    return token.replace("\r", "").replace("\n", "⏎").replace("\t", " ") or "□"


def _mark(shown: str, mark: str) -> str:
    """The mark as wide as the token, with the token's leading blank."""
    word = shown.lstrip(" ")
    return " " * (len(shown) - len(word)) + mark * len(word) if word else mark * len(shown)
