"""Value sign flip in cross-attention: one attention over both texts, the negative one's values with the other sign."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..decision import Call, Output, Slot
from ..pricing.sizes import sees_a_picture
from ..pricing.unit import Macs, Unit
from ..taps import Forward, Tap, projections, tapped
from .cross import named_arguments
from .edits import Guided, Tally
from .network import Projected
from .text import Size, spread


@dataclass(frozen=True, slots=True)
class Append(Guided):
    """Put the negative text behind the positive one: its values times -a, its logits lowered by b."""

    scale: float
    offset: float
    size: Size

    def apply(self, call: Call, slot: Slot) -> Output:  # noqa: ARG002
        """Run the stock processor on a longer text, under a mask that holds the offset."""
        assert call.module is not None
        text: Projected = call.notes["text"]
        named = named_arguments(call)
        own = named["encoder_hidden_states"]
        if isinstance(own, tuple):
            raise ValueError(f"{call.method} does not go with an IP-Adapter; NAG and NASA do.")
        if sees_a_picture(call.module):
            raise ValueError(f"{call.method} does not go with a picture beside the text; NAG and NASA do.")
        negative = spread(text[0], len(own))
        named["encoder_hidden_states"] = torch.cat([own, negative], 1)
        mask = self._mask(own, named.get("attention_mask"), negative, text[1])
        named["attention_mask"] = mask if _repeats_masks(call.module) else mask[:, None]
        Tally.at(call, len(own))
        values = projections(call.module, "to_v", "to_kv")
        with tapped({module: self._tap(name, own.shape[1]) for name, module in values.items()}):
            return call.forward(**named)

    def _mask(self, own: Tensor, mask: Tensor | None, negative: Tensor, bias: Tensor | None) -> Tensor:
        """What is added to the logits, (B, 1, T+ + T-)."""
        first = own.new_zeros(len(own), 1, own.shape[1]) if mask is None else mask
        second = own.new_full((len(own), 1, negative.shape[1]), -self.offset)
        return torch.cat([first, second if bias is None else second + spread(bias, len(own))], -1)

    def _tap(self, name: str, positive: int) -> Tap:
        def tap(original: Forward) -> Forward:
            def forward(tokens: Tensor) -> Tensor:
                projected: Tensor = original(tokens)
                factor = projected.new_ones(projected.shape[1:])
                first = factor.shape[-1] // 2 if name == "to_kv" else 0  # keys come before values
                factor[positive:, first:] = -self.scale
                return projected * factor

            return forward

        return tap

    def extra(self, unit: Unit, samples: int) -> Macs:
        """More keys for every query, and the projections of the negative text at every step."""
        sizes = unit.attended
        assert sizes is not None
        tokens = self.size.tokens_beside(sizes.text)
        attention = Macs(all=2 * sizes.queries * tokens * sizes.width * sizes.rows * samples)
        return attention + unit.part("to_k", "to_v", "to_kv").times(samples * tokens / sizes.text)


def _repeats_masks(module: nn.Module) -> bool:
    """Whether an attention repeats a mask (B, 1, T) for its heads; Wan's hands on what it is given."""
    from diffusers.models.attention_processor import Attention

    return isinstance(module, Attention)
