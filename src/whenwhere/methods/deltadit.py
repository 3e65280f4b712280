"""Δ-DiT: acceleration tailored for diffusion transformers (Chen et al., 2024, https://arxiv.org/abs/2406.01125).

The change that a run of blocks makes is kept at full steps and added to the present features in between. Rear blocks
draw details and front blocks outlines, and sampling draws outlines first: so the rear run is cached early and the front
run late. The authors published no code; what the paper leaves open is decided in the docstrings below.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from ..anatomy import find, walk
from ..clock import Step
from ..decision import Decision
from ..decisions.change import AddChange, KeepChange, Pass
from ..families import FAMILIES
from ..front import Front
from ..layout import argument_reader
from ..method import Method, Setting
from ..ranges import at_least, one_of, position
from ..site import Kind, Side, Site

_MODES = ("front", "middle", "rear")
_RESIDUALS = "controlnet_block_samples"  # the argument in which a ControlNet's residuals for long skips come

# An interval that serves both stages keeps apart the changes of the blocks that only the front run skips, that both do,
# and that only the rear run does. All others share one slot, so that it holds one tensor although the run moves.
_PARTS = (("front",), ("front", "rear"), ("rear",))


@dataclass(frozen=True)
class DeltaDiT(Method):
    """Δ-DiT.

    Steps s count evaluations from 0. A block over space and the one over time that takes turns with it are one block.
    Each list of blocks has a change of its own, and so has each stream of multi-modal blocks.

    Attributes:
        interval: N, at least 1: a full step every N steps; 1 is the plain run.
        blocks: N_c in 1 ... L, length of the run; a float in (0, 1) is a fraction of the L blocks, rounded.
        boundary: b in 0 ... steps: the rear run is cached at s < b, the front run from b on; a float in (0, 1) is a
            fraction of the executed schedule, rounded.
        mode: "adaptive" as above; or one run at all steps: "front", "rear", or "middle", which is centred and the only
            one that blocks joined by long skips allow.
        macs_budget: in (0, 1], the share of the multiply-adds of all blocks that may be spent; it then sets the length
            of the run in place of `blocks`: the shortest that keeps to it, and is centred across long skips.

    Raises:
        ValueError: a field out of range, here or when the model and the number of steps are known.
        TypeError: a field of the wrong type.
    """

    interval: int = 2
    blocks: int | float = 0.75  # 21 of the 28 blocks of PixArt-α, and 12 of its 20 steps
    boundary: int | float = 0.6
    mode: Literal["adaptive", "front", "middle", "rear"] = "adaptive"
    macs_budget: float | None = None

    kinds: ClassVar = frozenset({Kind.BLOCK})
    idle_reason: ClassVar = "every step is a full one; choose a larger interval."

    def __post_init__(self) -> None:
        at_least(1, interval=self.interval)
        position("blocks", self.blocks, minimum=1)
        position("boundary", self.boundary)
        one_of("mode", self.mode, ("adaptive", *_MODES))
        if self.macs_budget is not None and not 0 < self.macs_budget <= 1:
            raise ValueError(f"macs_budget must be above 0 and at most 1, got {self.macs_budget}")

    def check(self, sites: Sequence[Site], model: str) -> None:
        """Δ-DiT needs a row of alike blocks, and must not cut a long skip."""
        if any(site.kind is Kind.STAGE for site in sites):
            raise ValueError(f"{self} needs a row of transformer blocks; {model} is a U-Net. DeepCache works on it.")
        count = max((site.blocks for site in sites), default=0)
        if isinstance(self.blocks, int) and self.blocks > count:
            raise ValueError(f"{self}: {model} has only {count} blocks.")
        if self.mode != "middle" and any(site.kind is Kind.BLOCK and site.depth is not None for site in sites):
            raise ValueError(
                f"{self} would cut the long skips of {model}: blocks would be skipped whose skips are read. Choose "
                'mode="middle", or SkipCache.'
            )
        linked = any(site.kind is Kind.BLOCK and site.depth is not None for site in sites)
        if linked and self.macs_budget is None and (count - (length := self.length(count, 1))) % 2:
            raise ValueError(
                f"{self}: {length} of {count} blocks are not centred, which would cut the long skips of {model}; take "
                f"an {'odd' if count % 2 else 'even'} number."
            )
        if any(site.kind is Kind.CONTROL for site in sites) and self._loses_control(sites):
            raise ValueError(self._on_control(model))

    def _loses_control(self, sites: Sequence[Site]) -> bool:
        """Whether blocks that are passed would read skips, to which a ControlNet adds its residuals."""
        readers = [site for site in sites if site.kind is Kind.BLOCK and site.side is Side.DECODER]
        if not readers or self.interval == 1:
            return False
        count = readers[0].blocks
        behind = count if self.macs_budget is not None else (count + self.length(count, 1)) // 2
        return any((site.block or 0) < behind for site in readers)

    def _on_control(self, model: str) -> str:
        return (
            f"{self} passes blocks of {model} that read long skips, and what a ControlNet adds to these would be "
            "ignored without a word. Choose blocks=2, which passes the two in the middle only, or FORA."
        )

    def install(self, denoiser: nn.Module, present: Callable[[], Step]) -> Callable[[], None]:  # noqa: ARG002
        """Refuse residuals on skips that nobody reads also where a loop of one's own hands them to the denoiser."""
        named = {cls.__name__ for cls in type(denoiser).__mro__}
        controlled = {anatomy.model for anatomy in FAMILIES if anatomy.mirrored and _RESIDUALS in anatomy.rows}
        if named.isdisjoint(controlled) or not self._loses_control(tuple(walk(denoiser, find(denoiser, FAMILIES)))):
            return lambda: None
        arguments = argument_reader(type(denoiser).forward)

        def watched(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if arguments(args, kwargs).get(_RESIDUALS) is not None:
                    raise ValueError(self._on_control(type(denoiser).__name__))
                return original(*args, **kwargs)

            return forward

        return Front(denoiser, "forward", watched).remove

    def review(self, setting: Setting) -> None:
        """The boundary must lie in the schedule, and leave both stages something to cache."""
        b, steps = self._boundary(setting.steps), setting.steps
        if b > steps:
            raise ValueError(f"{self} has its boundary at step {b}; only {steps} are executed.")
        cached = [s for s in range(steps) if s % self.interval]
        early = sum(s < b for s in cached)
        if self.mode == "adaptive" and 0 < b < steps and cached and early in (0, len(cached)):
            stage = "late" if early else "early"
            warnings.warn(f"{self}: no step of the {stage} stage is cached; move the boundary {b}.", stacklevel=2)

    def decide(self, site: Site, step: Step) -> Decision | None:
        """Full steps keep the changes that the cached steps of the same interval add."""
        if site.block is None:
            return None
        full, stage = step.index % self.interval == 0, self._stage(step.index, step.count)
        runs = self._runs(site, step)
        mine = [mode for mode in runs if site.block in runs[mode]]
        if not (mine if full else stage in mine):
            return None
        row, number = site.path.rsplit(".", 1)
        home = f"{row} part {_PARTS.index(tuple(mine)) if len(runs) > 1 else 0}"
        if full:
            return KeepChange(home)
        before = [mode for mode in runs if site.block - 1 in runs[mode]]
        return Pass(home) if before == mine and number != "0" else AddChange(home)

    def _runs(self, site: Site, step: Step) -> dict[str, range]:
        """The runs that the cached steps of this step's interval skip, by mode, as numbers of blocks."""
        first = step.index - step.index % self.interval
        cached = range(first + 1, min(first + self.interval, step.count))
        length, count = self.length(site.blocks, step.count, site.depth is not None), site.blocks
        starts = {"front": 0, "middle": (count - length) // 2, "rear": count - length}
        stages = {self._stage(s, step.count) for s in cached}
        return {mode: range(starts[mode], starts[mode] + length) for mode in _MODES if mode in stages}

    def _stage(self, s: int, steps: int) -> str:
        return self.mode if self.mode != "adaptive" else "rear" if s < self._boundary(steps) else "front"

    def _boundary(self, steps: int) -> int:
        return round(self.boundary * steps) if isinstance(self.boundary, float) else self.boundary

    def length(self, blocks: int, steps: int, linked: bool = False) -> int:
        """N_c for a model of so many blocks, joined by long skips or not."""
        if self.macs_budget is not None:
            least = blocks_for_budget(self.macs_budget, steps, self.interval, blocks)
            return least + (blocks - least) % 2 if linked else least
        return max(1, round(self.blocks * blocks)) if isinstance(self.blocks, float) else self.blocks


def blocks_for_budget(budget: float, steps: int, interval: int, blocks: int) -> int:
    """N_c, the shortest run that keeps to a budget.

    With F = ceil(T / N) full steps, a generation costs F L + (T - F) (L - N_c) blocks, at most `budget` T L.

    Raises:
        ValueError: not even skipping all blocks does; the message names the smallest interval with which it would.
    """
    cached = steps - math.ceil(steps / interval)
    length = math.ceil((1 - budget) * steps * blocks / max(cached, 1) - 1e-9)  # rounding must not cost a block
    if length <= blocks and (cached or budget == 1):
        return max(1, length)
    larger = (n for n in range(interval + 1, steps + 1) if math.ceil(steps / n) <= budget * steps)
    raise ValueError(
        f"a budget of {budget:g} cannot be kept with a full step every {interval} of {steps} steps; "
        f"the smallest interval that can is {next(larger, None)}."
    )
