"""The frozen text stream: what T-GATE's reasoning (Liu et al., 2024, https://arxiv.org/abs/2404.02747) leaves to do in
joint attention.

Where text and image share one attention (SD 3, Flux) there is no cross-attention whose output could be frozen: what the
image reads of the text is weighed against the image itself, in one softmax. What can be frozen is the text's side of
it, the keys and values of every block, and then the text's whole stream has nothing left to do. This is ours; it is not
T-GATE, and no paper vouches for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..clock import Step
from ..decision import Decision
from ..decisions.textstream import FrozenText, ImageOnly, KeepText, LeaveOut, TextBlock
from ..position import FromStep, Position
from ..site import TOGETHER, Kind, Site


@dataclass(frozen=True)
class TextStreamFreeze(FromStep):
    """Freeze the text's keys and values in joint attention after m evaluations, and stop the text's stream there.

    Guidance is left as it is: every branch keeps its own. Dropping it too is `GuidanceStop`.

    Attributes:
        step: m, evaluations with a computed text stream, in 1 ... steps; a float in (0, 1) is a fraction of the
            executed schedule, rounded; at `Timestep(t)` or `Sigma(s)` the first step below it is the first frozen one.

    Raises:
        ValueError: `step` out of range, here or when the number of steps is known.
        TypeError: `step` is no position.
    """

    step: Position = 10

    kinds: ClassVar = frozenset({Kind.BLOCK, Kind.JOINT_ATTENTION, Kind.MLP, *TOGETHER})
    does: ClassVar = "freezes"
    lasting: ClassVar = True
    innermost: ClassVar = True  # what others choose, or keep, is chosen and kept of both streams
    idle_reason: ClassVar = "the text is frozen only after the last step."

    def asks(self, site: Site) -> bool:
        """Joint attentions, their blocks, the text's MLPs, and what serves both streams."""
        return site.kind in self.kinds and (site.kind is not Kind.MLP or site.text)

    def check(self, sites: Sequence[Site], model: str) -> None:
        """It needs joint attention."""
        if not any(site.kind is Kind.JOINT_ATTENTION for site in sites):
            raise ValueError(
                f"{self} freezes the text in joint attention; {model} has none. CrossAttentionFreeze and TGate work "
                "where there is cross-attention."
            )

    def decide(self, site: Site, step: Step) -> Decision | None:
        """Keep at step m - 1, leave the text out from m on."""
        m = self.first(step)
        if m == step.count or step.index < m - 1:
            return None
        frozen = step.index >= m
        if site.kind is Kind.BLOCK:
            return TextBlock(frozen)
        if site.kind is Kind.MLP:
            return LeaveOut() if frozen else None
        if site.kind is not Kind.JOINT_ATTENTION:
            return ImageOnly() if frozen else None
        return FrozenText() if frozen else KeepText()

    def renews(self, step: Step) -> bool:
        """At the step whose keys and values are kept, so that every block is reached."""
        return step.index == self.first(step) - 1 < step.count - 1
