"""Guidance in Flux as the authors' code has it: the whole batch twice, once for each text, guided alike.

In the blocks with one set of weights each copy of the image is modulated by its own text's time embedding, so the two
drift apart, and the negative output is that of the copy's queries. In the blocks with two sets both copies have the
positive time embedding. The prediction is the first copy's.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..decision import Call, Output, Slot, map_tensors
from ..pricing.unit import Macs, Unit
from ..taps import Forward, Tap, tapped
from .cross import conditional_rows
from .edits import Edit, Guided, Tally
from .provide import negative_text
from .text import Size, spread

_WITH_RESIDUALS = ("controlnet_block_samples", "controlnet_single_block_samples")


@dataclass(frozen=True, slots=True)
class Double(Guided):
    """Run the denoiser for both texts at once, and return what the first of them gives."""

    size: Size

    def apply(self, call: Call, slot: Slot) -> Output:  # noqa: ARG002
        """Repeat every argument that holds rows; texts and pooled vectors are each copy's own."""
        text, samples = negative_text(call), len(call.tokens)
        conditional_rows(call, samples)
        own = call.kwargs["encoder_hidden_states"]
        if text.pooled is None or text.embeds.shape[1] != own.shape[1]:
            raise ValueError(
                f"{call.method}: this mode needs the negative pooled vector and texts of equal length; there are "
                f"{own.shape[1]} tokens and {text.embeds.shape[1]}, pooled: {text.pooled is not None}."
            )
        twice = {name: self._twice(name, value, samples) for name, value in call.kwargs.items()}
        twice["encoder_hidden_states"] = torch.cat([own, spread(text.embeds, samples)])
        twice["pooled_projections"] = torch.cat([call.kwargs["pooled_projections"], spread(text.pooled, samples)])
        call.notes["text tokens"] = own.shape[1]
        return map_tensors(call.forward(**twice), lambda tensor: tensor[:samples])

    def _twice(self, name: str, value: Any, samples: int) -> Any:
        if name in _WITH_RESIDUALS or name in ("hidden_states", "timestep", "guidance"):
            return map_tensors(value, lambda tensor: torch.cat([tensor, tensor]) if len(tensor) == samples else tensor)
        return value

    def extra(self, unit: Unit, samples: int) -> Macs:
        """Everything a second time."""
        return unit.macs.times(samples)


@dataclass(frozen=True, slots=True)
class OneTime(Guided):
    """Give both copies of the image the time embedding of the first in a block with two sets of weights."""

    def apply(self, call: Call, slot: Slot) -> Output:  # noqa: ARG002
        """Run under a tap of the image's norm."""
        assert call.module is not None
        norm = getattr(call.module, "norm1", None)
        if norm is None:
            return call.run()
        with tapped({norm: _tap_norm}):
            return call.run()


def _tap_norm(original: Forward) -> Forward:
    def forward(tokens: Tensor, emb: Tensor) -> Any:
        first = emb[: len(emb) // 2]
        return original(tokens, emb=torch.cat([first, first]))

    return forward


@dataclass(frozen=True, slots=True)
class GuideBoth(Guided):
    """Write the guided image tokens into both copies."""

    edit: Edit

    def apply(self, call: Call, slot: Slot) -> Output:  # noqa: ARG002
        """Guide before the output projection, or what an attention without one puts out."""
        attn: Any = call.module
        tally = Tally.at(call, len(call.tokens) // 2)
        if hasattr(attn, "to_out"):
            with tapped({attn.to_out[0]: self._tap_output(tally)}):
                return call.run()
        text, image = call.run().tensor_split([call.notes["text tokens"]], 1)
        return torch.cat([text, self._both(image, tally)], 1)

    def _tap_output(self, tally: Tally) -> Tap:
        return lambda original: lambda attended: original(self._both(attended, tally))

    def _both(self, attended: Tensor, tally: Tally) -> Tensor:
        positive, negative = attended.chunk(2)
        guided = self.edit(positive, negative, tally)
        return torch.cat([guided, guided])
