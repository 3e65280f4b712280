"""Skip-Cache with an offset: ours, on the schedule of Skip-Cache (Chen et al., 2024, https://arxiv.org/abs/2411.17616).

Skip-Cache puts the old feature in front of the last k blocks as it is. Here what the blocks in between added to the
stream is remembered, and added to the present output of the first k blocks, so that the stream is fresh as well as the
skips. The cost is the same, and so is the memory: one tensor. With a window of the whole run it is the middle mode of
Δ-DiT.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import nn

from ..clock import Step
from ..decision import Decision
from ..decisions.change import AddChange, KeepChange, Pass
from ..longskips import check_ladder, check_skips, check_window, is_full
from ..method import Method
from ..ranges import at_least
from ..site import Kind, Site

_HOME = "between the long skips"


@dataclass(frozen=True)
class SkipOffset(Method):
    """Skip-Cache that remembers h_{L-k-1}(t') - h_{k-1}(t') and adds it to h_{k-1}(t).

    Attributes:
        interval, depth, start_timestep, stop_timestep: as in `SkipCache`.

    Raises:
        ValueError: a field out of range, here or when the model is known; a solver that evaluates a timestep twice; a
            model in which blocks over space and over time take turns, which have no common stream.
        TypeError: a field of the wrong type.
    """

    interval: int = 2
    depth: int = 1
    start_timestep: float = 700
    stop_timestep: float = 50

    kinds: ClassVar = frozenset({Kind.BLOCK})
    reads_timestep: ClassVar = True
    idle_reason: ClassVar = "no step is partial: so few steps leave none in the window, or the interval is 1."

    def __post_init__(self) -> None:
        at_least(1, interval=self.interval, depth=self.depth)
        check_window(self.start_timestep, self.stop_timestep)

    def asks(self, site: Site) -> bool:
        """Blocks joined by long skips."""
        return site.kind in self.kinds and site.depth is not None

    def check(self, sites: Sequence[Site], model: str) -> None:
        """It needs long skips, and blocks that all read one stream."""
        check_ladder(self, self.depth, sites, model)
        blocks = [site for site in sites if self.asks(site)]
        if len(blocks) != blocks[0].blocks:
            raise ValueError(
                f"{self} adds up what blocks do to one stream; in {model} blocks over space and over time take turns. "
                "SkipCache and SkipForecast work on this model."
            )

    def fit(self, denoiser: nn.Module, pipe: object = None) -> Self:  # noqa: ARG002
        """Every recomputed pair needs its skip; otherwise the method is as it was."""
        check_skips(self, self.depth, denoiser)
        return self

    def decide(self, site: Site, step: Step) -> Decision | None:
        """Full steps keep the change of the blocks in between, the others add it in front of the first of them."""
        if site.depth is None or site.depth < self.depth:
            return None
        if is_full(step, self.interval, self.start_timestep, self.stop_timestep, self):
            return KeepChange(_HOME)
        return AddChange(_HOME) if site.block == self.depth else Pass(_HOME)
