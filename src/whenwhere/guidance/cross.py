"""Guidance in cross-attention: one attention run for two texts on the same queries.

The attention's own processor runs as usual. When it comes to its output projection it is run a second time, for the
negative text: the queries are those it has, the keys and values are remembered from the first step, and it is cut
short before the projection. What is projected in the end is the guided output.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Role
from ..decision import Call, Output
from ..layout import argument_reader
from ..pricing.sizes import TEXT_BESIDE_PICTURE, sees_a_picture
from ..taps import Forward, Tap, projections, tapped
from .network import Projected
from .text import spread


@cache
def _reader_of(cls: Any) -> Callable[..., dict[str, Any]]:
    return argument_reader(cls.forward)


def conditional_rows(call: Call, total: int) -> slice:
    """The rows that are guided.

    Raises:
        ValueError: nobody told which they are.
    """
    if call.branches is None:
        raise ValueError(
            f"{call.method}: this pipeline does not tell whether its batch holds guidance branches, so the rows to "
            "guide are not known. Say attach(..., guidance=True), or False where guidance is off."
        )
    return call.branches.rows_of(Role.CONDITIONAL, total)


def named_arguments(call: Call) -> dict[str, Any]:
    """All arguments of a call by name."""
    cls: Any = type(call.module)
    return _reader_of(cls)(call.args, call.kwargs)


class Twice:
    """One call of a cross-attention that is run for a second text.

    Attributes:
        keys: keys and values of the second text by the name of their projection, (R, T, D); filled when they are made.
    """

    def __init__(self, call: Call, text: Projected, keys: dict[str, Tensor], guide: Callable[..., Tensor]) -> None:
        assert call.module is not None
        self._attn, self._call, self._text, self._guide = call.module, call, text, guide
        self._named = named_arguments(call)
        self._tokens: Tensor = self._named["hidden_states"]
        self._rows = conditional_rows(call, len(self._tokens))
        self._picture = sees_a_picture(self._attn)
        self.keys = keys
        self._seen: dict[str, Tensor] = {}  # projections of the whole batch
        self._second: dict[str, Tensor] | None = None  # what stands for the keys and values of a second run
        self._output: Tensor | None = None  # of a second run, before the output projection

    def run(self) -> Output:
        """Run with the guided rows in place of the conditional ones."""
        taps: dict[nn.Module, Tap] = {
            module: self._tap_input(name)
            for name, module in projections(self._attn, "to_q", "to_k", "to_v", "to_kv").items()
        }
        if self._picture:
            added = projections(self._attn, "add_k_proj", "add_v_proj", "to_added_kv")
            taps |= {module: self._tap_picture(name) for name, module in added.items()}
        out: Any = self._attn.get_submodule("to_out.0")
        with tapped({**taps, out: self._tap_output}):
            output = self._call.run()
        if self._output is None:
            raise RuntimeError(f"{self._call.site} did not come by its output projection, so nothing was guided.")
        return output

    def _tap_input(self, name: str) -> Tap:
        def tap(original: Forward) -> Forward:
            def forward(tokens: Tensor) -> Tensor:
                if self._second is None:
                    self._seen[name] = original(tokens)
                    return self._seen[name]
                if name == "to_q":
                    return self._seen[name][self._rows]
                if name not in self._second:
                    # One row of each text, copied: an expanded one is multiplied in batches of one.
                    own = tokens[:: len(tokens) // len(self._text[0])]
                    self._second[name] = original(own.clone(memory_format=torch.contiguous_format))
                return spread(self._second[name], len(tokens))

            return forward

        return tap

    def _tap_picture(self, name: str) -> Tap:
        """In the second run the picture is one token of zeros, which adds nothing to what the text gives."""

        def tap(original: Forward) -> Forward:
            def forward(tokens: Tensor) -> Tensor:
                if self._second is None:
                    return original(tokens)  # type: ignore[no-any-return]
                width: Any = self._attn.inner_dim
                return tokens.new_zeros(*tokens.shape[:2], 2 * width if name == "to_added_kv" else width)

            return forward

        return tap

    def _tap_output(self, original: Forward) -> Forward:
        def forward(attended: Tensor) -> Output:
            if self._second is not None:
                self._output = attended
                width: Any = getattr(self._attn, "out_dim", None) or self._attn.get_submodule("to_out.0").out_features
                return attended.new_zeros(()).expand(*attended.shape[:-1], width)
            conditional = attended[self._rows]
            guided = self._guided(conditional)
            return original(put_rows(attended, self._rows, guided))

        return forward

    def _guided(self, conditional: Tensor) -> Tensor:
        """Guide the text's part of Z; the images of an IP-Adapter, or Wan's picture, were added to it and stay."""
        negative = self._run_again(self._text, self.keys)
        text = self._text_alone()
        if text is None:
            return self._guide(conditional, negative)
        own = {name: tensor[self._rows] for name, tensor in self._seen.items() if name != "to_q"}
        mask = self._named.get("attention_mask")
        positive = self._run_again((text[self._rows], None if mask is None else mask[self._rows]), own)
        return conditional - positive + self._guide(positive, negative)

    def _text_alone(self) -> Tensor | None:
        """The positive text where images come with it, (R, T, D)."""
        given: Any = self._named["encoder_hidden_states"]
        if isinstance(given, tuple):
            return given[0]  # type: ignore[no-any-return]
        return given[:, -TEXT_BESIDE_PICTURE:] if self._picture else None

    def _run_again(self, text: Projected, keys: dict[str, Tensor]) -> Tensor:
        """Z of the conditional queries for another text."""
        tokens = self._tokens[self._rows]
        context, mask = spread(text[0], len(tokens)), None if text[1] is None else spread(text[1], len(tokens))
        if self._picture:
            context = torch.cat([context.new_zeros(len(context), 1, context.shape[2]), context], 1)
        named = {**self._named, "hidden_states": tokens, "encoder_hidden_states": context, "attention_mask": mask}
        if isinstance(self._named["encoder_hidden_states"], tuple):
            named |= {"encoder_hidden_states": (context, []), "ip_adapter_masks": None}
        self._second = keys
        try:
            assert self._call.alone is not None
            self._call.alone(**named)
        finally:
            self._second = None
        assert self._output is not None
        return self._output


def put_rows(tensor: Tensor, rows: slice, changed: Tensor) -> Tensor:
    """The same with some rows changed, out of place."""
    return changed if len(changed) == len(tensor) else torch.cat([tensor[: rows.start], changed, tensor[rows.stop :]])
