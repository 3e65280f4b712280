"""Skip-Cache with an offset: ours, on the schedule of Skip-Cache (Chen et al., 2024, https://arxiv.org/abs/2411.17616).

Skip-Cache puts the old feature in front of the last k blocks as it is. Here what the blocks in between added to the
stream is remembered, and added to the present output of the first k blocks, so that the stream is fresh as well as the
skips. The cost is the same, and so is the memory: one tensor. With a window of the whole run it is the middle mode of
Δ-DiT.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..clock import Step
from ..decision import Decision
from ..decisions.change import AddChange, KeepChange, Pass
from ..longskips import LongSkips
from ..ranges import at_least
from ..site import Site

_HOME = "between the long skips"


@dataclass(frozen=True)
class SkipOffset(LongSkips):
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

    def __post_init__(self) -> None:
        at_least(1, interval=self.interval, depth=self.depth)
        self.check_window()

    def check(self, sites: Sequence[Site], model: str) -> None:
        """It needs long skips, and blocks that all read one stream."""
        super().check(sites, model)
        blocks = [site for site in sites if self.asks(site)]
        if len(blocks) != blocks[0].blocks:
            raise ValueError(
                f"{self} adds up what blocks do to one stream; in {model} blocks over space and over time take turns. "
                "SkipCache and SkipForecast work on this model."
            )

    def decide(self, site: Site, step: Step) -> Decision | None:
        """Full steps keep the change of the blocks in between, the others add it in front of the first of them."""
        if site.depth is None or site.depth < self.depth:
            return None
        if self.full_every(self.interval, step):
            return KeepChange(_HOME)
        return AddChange(_HOME) if site.block == self.depth else Pass(_HOME)
