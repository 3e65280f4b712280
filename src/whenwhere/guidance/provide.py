"""The negative text at the model: taken from where it comes, projected once, given to the attentions inside."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..anatomy import Role
from ..decision import Call, Decision, Output, Slot
from ..pricing.unit import Macs, Unit
from .cross import conditional_rows
from .edits import Guided
from .network import Projected, network_of
from .text import Size, Text


class Given(Guided):
    """Run the denoiser with the negative text as it was projected in an earlier step."""

    size: Size

    recalls: ClassVar[bool] = True

    @abstractmethod
    def run(self, call: Call, text: Projected) -> Output:
        """Run the denoiser with a projected text."""

    def apply(self, call: Call, slot: Slot) -> Output:
        """Recall, run."""
        return self.run(call, slot.value)

    def fresh(self) -> Decision:
        """Project it."""
        return GivenAnew(self)


@dataclass(frozen=True, slots=True)
class GivenAnew(Guided):
    """The same, but project the negative text, and remember it."""

    given: Given
    keep: bool = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """Project, keep, run."""
        text = projected(call)
        if self.keep:
            slot.put(text, call)
        return self.given.run(call, text)

    @property
    def keeps(self) -> bool:
        """Whether a later step wants it."""
        return self.keep

    def bare(self) -> Decision:
        """Without keeping."""
        return GivenAnew(self.given, keep=False)

    def held_bytes(self, unit: Unit, branches: int, samples: int) -> int:  # noqa: ARG002
        """The text, (R, T, D), and its mask, (R, 1, T)."""
        size = self.given.size
        return size.rows_for(samples) * self._tokens(unit) * size.numbers * unit.itemsize

    def extra(self, unit: Unit, samples: int) -> Macs:
        """The projection, once for every row of the text, beside what is spent every time."""
        size, positive = self.given.size, unit.attended.text if unit.attended else 1
        projection = unit.part(*size.projections).times(size.rows_for(samples) * self._tokens(unit) / positive)
        return projection + self.given.extra(unit, samples)

    def _tokens(self, unit: Unit) -> int:
        return self.given.size.tokens_beside(unit.attended.text if unit.attended else 1)


@dataclass(frozen=True, slots=True)
class Provide(Given):
    """Give the attentions inside the negative text."""

    size: Size

    def run(self, call: Call, text: Projected) -> Output:
        """Run with the text in the method's notes, and take it out again."""
        call.notes["text"] = text
        try:
            return call.run()
        finally:
            del call.notes["text"]


def projected(call: Call) -> Projected:
    """The negative text of a call of the denoiser, as the attentions take it; a copy.

    Raises:
        ValueError: its rows do not go with the samples, its mask is missing, there is none.
    """
    assert call.module is not None
    context, bias = network_of(call.module).project(call.module, negative_text(call))
    return context.clone(), bias


def negative_text(call: Call) -> Text:
    """The negative text of a call of the denoiser, on its device and in its type.

    Raises:
        ValueError: as above.
    """
    assert call.module is not None
    network, tokens = network_of(call.module), call.tokens
    rows = conditional_rows(call, len(tokens))
    text = (call.method.text or _of_guidance(call, network.arguments)).to(tokens)
    samples = rows.stop - rows.start
    if text.rows not in (1, samples):
        raise ValueError(
            f"{call.method}: the negative text has {text.rows} rows for {samples} samples; give one row, or one for "
            "each sample (with num_images_per_prompt, every row so many times in succession)."
        )
    for part in ("mask", "mask_2"):
        argument = network.arguments.get(part)
        if argument and call.kwargs.get(argument) is not None and getattr(text, part) is None:
            raise ValueError(f"{call.method}: the prompt comes with {argument}, so the negative text needs its {part}.")
    return text


def _of_guidance(call: Call, arguments: Mapping[str, str]) -> Text:
    """The negative text of classifier-free guidance in the same batch."""
    assert call.branches is not None
    if Role.UNCONDITIONAL not in call.branches.roles:
        raise ValueError(
            f'{call.method} has no negative text: give negative_prompt ("" for the empty prompt) or '
            "negative_prompt_embeds. Only where guidance is on is the pipeline's own taken."
        )
    rows = call.branches.rows_of(Role.UNCONDITIONAL, len(call.tokens))
    given = {part: call.kwargs.get(argument) for part, argument in arguments.items()}
    return Text(**{part: value[rows] for part, value in given.items() if value is not None})
