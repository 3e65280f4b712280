"""ToCa: accelerating diffusion transformers with token-wise feature caching (Zou et al., ICLR 2025,
https://arxiv.org/abs/2410.05317).

Between full steps attention and MLP outputs are reused. Tokens differ in how much they suffer from that, so the MLP
(and cross-attention) runs on the few that suffer most: those that others attend to, or that heed the text least
clearly, that were left alone for long, and that are the best of their neighbourhood.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self, TypeAlias

from torch import nn

from ..clock import Step
from ..decision import Decision
from ..decisions.freshness import SCHEDULES, Schedule, factor, full_steps
from ..decisions.refresh import Full, Recall, Refresh
from ..method import Method, Setting
from ..ranges import at_least, one_of
from ..site import TOGETHER, Kind, Site

__all__ = ["Schedule", "ToCa"]

Score: TypeAlias = Literal["attention", "cross_attention", "key_norm", "value_norm", "norm", "random"]

SOURCES = {  # of the score: the kind of attention whose projections tell it; the others need none
    "attention": Kind.SELF_ATTENTION,
    "key_norm": Kind.SELF_ATTENTION,
    "value_norm": Kind.SELF_ATTENTION,
    "cross_attention": Kind.CROSS_ATTENTION,
    "norm": None,
    "random": None,
}

# Interval, share and score that the authors ran with each of their schedules.
_PUBLISHED: Mapping[str, tuple[int, float, Score]] = {
    "dit-ddim": (3, 0.07, "attention"),
    "dit-ddpm": (4, 0.07, "attention"),
    "pixart": (3, 0.3, "cross_attention"),
    "flux": (4, 0.1, "attention"),
}


@dataclass(frozen=True)
class ToCa(Method):
    """ToCa.

    The defaults are those for DiT; `ToCa.published("pixart")` and `ToCa.published("flux")` are those for the others,
    where interval, share and score differ too.

    Attributes:
        interval: N, at least 1: about every N-th step is full; 1 is the plain run.
        fresh_ratio: in [0, 1]: the share of tokens that is refreshed, before the factors of the schedule; 0 is FORA.
        score: what makes a token important: the "attention" it receives (s1 of the paper), the entropy of its
            "cross_attention" (s2), the "key_norm", "value_norm" or "norm" of its features, or nothing ("random").
        frequency_weight: lambda3, at least 0: the weight of the steps since it was computed last (s3), in units of N.
        schedule: "dit-ddim" (50 steps), "dit-ddpm" (250 steps), "pixart" or "flux", or a `Schedule`.
        grid: height and width of the token grid; empty for a square.

    Raises:
        ValueError: a field out of range, here or when the model is known.
        TypeError: a field of the wrong type.
    """

    interval: int = 3
    fresh_ratio: float = 0.07
    score: Score = "attention"
    frequency_weight: float = 0.25
    schedule: str | Schedule = "dit-ddim"
    grid: tuple[int, ...] = ()

    kinds: ClassVar = frozenset({Kind.SELF_ATTENTION, Kind.CROSS_ATTENTION, Kind.JOINT_ATTENTION, Kind.MLP, *TOGETHER})
    idle_reason: ClassVar = "every step is a full one; choose a larger interval."

    def __post_init__(self) -> None:
        at_least(1, interval=self.interval)
        if not 0 <= self.fresh_ratio <= 1:
            raise ValueError(f"fresh_ratio must be a share in [0, 1], got {self.fresh_ratio}")
        one_of("score", self.score, tuple(SOURCES))
        if not 0 <= self.frequency_weight < math.inf:
            raise ValueError(f"frequency_weight must be at least 0, got {self.frequency_weight}")
        if not isinstance(self.schedule, Schedule):
            one_of("schedule", self.schedule, tuple(SCHEDULES))
        object.__setattr__(self, "grid", tuple(self.grid))
        at_least(1, **{f"grid[{i}]": side for i, side in enumerate(self.grid)})
        if len(self.grid) not in (0, 2):
            raise ValueError(f"grid must be (height, width), or empty for a square, got {self.grid}")

    @classmethod
    def published(cls, schedule: str) -> Self:
        """All fields as the authors set them for a schedule: "dit-ddim", "dit-ddpm", "pixart" or "flux".

        Raises:
            ValueError: another name.
        """
        one_of("schedule", schedule, tuple(_PUBLISHED))
        return cls(*_PUBLISHED[schedule], schedule=schedule)

    @property
    def constants(self) -> Schedule:
        """The schedule itself."""
        return self.schedule if isinstance(self.schedule, Schedule) else SCHEDULES[self.schedule]

    def conflict(self, other: Method, sites: Sequence[Site]) -> str:
        """In joint attention tokens of one text are chosen, and of some sites the shape alone is kept."""
        joint = any(site.kind is Kind.JOINT_ATTENTION for site in sites)
        if joint and other.steers:
            return "it runs the blocks for a second text, whose tokens would be taken for those of the first."
        if joint and other.observes:
            return "it would remember the attention of single blocks at steps at which that puts out a shape alone."
        return super().conflict(other, sites)

    def check(self, sites: Sequence[Site], model: str) -> None:
        """A stack of plain blocks, and the attention that the score is read from."""
        blocks = [site for site in sites if site.kind is Kind.BLOCK]
        plain = len(blocks) == max((site.blocks for site in blocks), default=0) and all(b.side is None for b in blocks)
        kinds = {site.kind for site in sites}
        joint = Kind.JOINT_ATTENTION in kinds
        if not plain or not blocks or Kind.STAGE in kinds or (joint and Kind.PROJECTION not in kinds):
            raise ValueError(
                f"{self} knows stacks of plain blocks, as in DiT and PixArt, and those of Flux; {model} has neither. "
                "FORA works on this model."
            )
        if joint and self.constants.bonus and self.fresh_ratio:
            raise ValueError(
                f"{self} spreads its choice over a picture; {model} has text among it: schedule='flux', as in "
                "ToCa.published('flux')."
            )
        if SOURCES[self.score] is Kind.CROSS_ATTENTION and Kind.CROSS_ATTENTION not in kinds:
            raise ValueError(f"{self} scores by cross-attention; {model} has none: score='attention' works on it.")

    def fit(self, denoiser: nn.Module, pipe: object = None) -> Self:  # noqa: ARG002
        """An MLP must work on one token at a time."""
        for path, module in denoiser.named_modules():
            if isinstance(module, nn.Conv2d) and ".ff." in path:
                raise ValueError(
                    f"{self} knows stacks of plain blocks; {path} of {type(denoiser).__name__} convolves neighbouring "
                    "tokens, which cannot be refreshed one by one. FORA works on this model."
                )
        return self

    def review(self, setting: Setting) -> None:
        """A grid that is not square must be named, since tokens do not tell."""
        oblong = setting.size is not None and setting.size[-1] != setting.size[-2]
        if oblong and not self.grid and self.constants.bonus and self.fresh_ratio:
            raise ValueError(f"{self}: the picture is not square; name its tokens by grid=(height, width).")

    def full_steps(self, steps: int) -> tuple[int, ...]:
        """The steps among this many at which everything is computed, ascending from 0."""
        return full_steps(steps, self.interval, self.constants, self.fresh_ratio > 0)

    def share(self, site: Site, step: Step) -> float:
        """The share of tokens that is refreshed at a step that is not full, in [0, 1]."""
        fixed = self.constants
        moment = step.count - 1 - step.index if fixed.counts_down else step.index
        number = (site.block or 0) - (site.blocks - site.count if site.kind in TOGETHER else 0)
        depth = number / (fixed.last or max(1, site.blocks - 1))
        ratio = self.fresh_ratio * factor(fixed.blocks, depth) * factor(fixed.steps, moment / step.count)
        ratio *= fixed.of(site)
        return min(max(ratio, 0.0), 1.0)

    def decide(self, site: Site, step: Step) -> Decision | None:
        """Full steps compute, keep and score; the others reuse, and refresh where the schedule says so."""
        full = self.full_steps(step.count)
        age = step.index - full[bisect_right(full, step.index) - 1]
        refreshed = self.fresh_ratio > 0 and self.constants.of(site) > 0
        source = SOURCES[self.score]
        scored = self.fresh_ratio > 0 and (site.kind is source or (source and site.kind is Kind.JOINT_ATTENTION))
        tracked = refreshed and site.kind is not Kind.PROJECTION
        unread = site.parallel and not (self.fresh_ratio > 0 and self.constants.parallel > 0)
        outlined = site.kind is Kind.EXPANSION or (unread and site.kind is Kind.JOINT_ATTENTION)
        whole = Full(step.branches, site.block or 0, self.score if scored else "", tracked, age, outlined)
        if age == 0:
            return whole
        ratio = self.share(site, step) if refreshed else 0.0
        return Refresh(ratio, whole) if ratio > 0 else Recall(whole)
