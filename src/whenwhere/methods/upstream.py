"""Caches of diffusers itself as a method, so that they can be compared on equal terms.

First-block cache (ParaAttention's, without a paper), MagCache (Ma et al., 2025, https://arxiv.org/abs/2506.09045),
TaylorSeer (Liu et al., 2025, https://arxiv.org/abs/2503.06923) and Pyramid Attention Broadcast (Zhao et al., 2024,
https://arxiv.org/abs/2408.12588) as diffusers implements them. They decide while they run, so a plan shows the most
that is computed, and the trace what was.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from ..clock import Step
from ..decision import Decision
from ..method import Method, Setting
from ..site import Kind, Site
from ..upstream import CONFIGURATIONS, FAILING, InContext, Skipped, put_on

_SEEN = (Kind.BLOCK, Kind.SELF_ATTENTION, Kind.CROSS_ATTENTION, Kind.JOINT_ATTENTION, Kind.MLP)


@dataclass(frozen=True)
class Upstream(Method):
    """One of diffusers' own caches.

    Attributes:
        config: its configuration, for example `FirstBlockCacheConfig(threshold=0.1)`. A callback that gives the present
            timestep need not be given.

    Raises:
        TypeError: it is no such configuration.
        ValueError: when attached: diffusers refuses the model, or would attach nothing.
    """

    config: Any = field(hash=False)

    kinds: ClassVar = frozenset({Kind.MODEL, *_SEEN})
    reads_timestep: ClassVar = True  # for those that go by it
    innermost: ClassVar = True  # what they remember has the rows that the others leave in the batch
    observes: ClassVar = True
    idle_reason: ClassVar = "diffusers skipped nothing; its threshold, window or step count may leave nothing to skip."

    def __post_init__(self) -> None:
        if type(self.config).__name__ not in CONFIGURATIONS:
            raise TypeError(
                f"config must be one of diffusers' {', '.join(CONFIGURATIONS)}; got {type(self.config).__name__}"
            )

    def check(self, sites: Sequence[Site], model: str) -> None:  # noqa: ARG002
        """Some are put on, and fail while they run."""
        name = type(self.config).__name__
        reason = FAILING.get((name, model))
        if reason is not None:
            raise ValueError(f"{name} fails on {model} in diffusers: {reason}. FORA and DeltaDiT work on it.")

    def review(self, setting: Setting) -> None:
        """MagCache counts the steps it was told."""
        told = getattr(self.config, "num_inference_steps", setting.steps)
        if told != setting.steps:
            raise ValueError(
                f"{type(self.config).__name__} was told num_inference_steps={told}, but {setting.steps} are executed."
            )

    def install(self, denoiser: nn.Module, present: Callable[[], Step]) -> Callable[[], None]:
        """Put the hooks on."""
        return put_on(denoiser, self.config, present)

    def decide(self, site: Site, step: Step) -> Decision | None:
        """The hooks decide for themselves; at the denoiser they are told of the call."""
        return InContext(renew=step.index == 0 and step.pass_ == 0) if site.kind is Kind.MODEL else None

    def missed(self, site: Site) -> Decision:  # noqa: ARG002
        """A hook skipped it."""
        return Skipped()

    def remark(self, step: Step, notes: Mapping[str, Any]) -> str:  # noqa: ARG002
        """What a plan cannot know."""
        decides = f"Upstream: {type(self.config).__name__} decides while it runs"
        return "" if notes else f"{decides}; drawn is the most that is computed"
