"""What all methods that steer attention away from a negative text have in common: the text, when, and where."""

import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from ..clock import Step
from ..decision import Decision
from ..method import Method
from ..position import Position, is_threshold, told
from ..site import Kind, Site
from .edits import Edit
from .fitting import check_length, check_processors, size_of
from .guide import Guide
from .joint import Accompany, Beside, GuideJoint
from .network import Network, Published, network_of
from .provide import Provide
from .reference import Double, GuideBoth, OneTime
from .text import Size, Text, encode
from .window import check_window, edges, in_range


@dataclass(frozen=True, kw_only=True)
class Steering(Method):
    """The negative text, the window and the layers of a method.

    A step is guided where `start` <= step < `end`. Both are steps as whole numbers; fractions as floats in [0, 1], of
    the executed steps, floor(start n) <= i < ceil(end n), or of the timesteps; or thresholds, `Timestep(600)` or
    `Sigma(4.0)`, each the first step below it: with `end=Sigma(4.0)` all steps of a noise level of 4 or more.

    Attributes:
        negative_prompt: one for all samples, or one for each; "" is the empty prompt, `None` that of the pipeline's own
            guidance where it is on. Encoded by the pipeline when the method is attached.
        negative_prompt_embeds: the same already encoded: (1 or B, T, D), or a `Text` with its mask and pooled vector.
        start, end: the window.
        window: what fractions count. "steps"; "timestep", the rule of the authors' code, which counts the range of
            timesteps and so covers more steps where a schedule is shifted.
        layers: of which attentions, by number in the order of execution or by a regular expression that is found in the
            path; empty for all.

    Raises:
        ValueError: a field out of range.
    """

    negative_prompt: str | Sequence[str] | None = None
    negative_prompt_embeds: Tensor | Text | None = field(default=None, repr=False, compare=False)
    start: Position = 0.0
    end: Position = 1.0
    window: Literal["steps", "timestep"] = "steps"
    layers: tuple[int | str, ...] = ()
    network: Network | None = field(default=None, repr=False, compare=False)  # the model's, once fitted
    size: Size = field(default=Size(rows=0), repr=False, compare=False)  # of the text, once fitted

    kinds: ClassVar = frozenset({Kind.MODEL, Kind.BLOCK, Kind.CROSS_ATTENTION, Kind.JOINT_ATTENTION})
    innermost: ClassVar = True
    steers: ClassVar = True
    idle_reason: ClassVar = "its scale or its window is off, or every guided attention was reused."

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            object.__setattr__(self, "negative_prompt", tuple(self.negative_prompt))
        check_window(self.start, self.end, self.window)

    @property
    @abstractmethod
    def off(self) -> bool:
        """Whether it changes nothing."""

    @abstractmethod
    def steer(self, site: Site, step: Step) -> Decision | None:
        """What to do at a site in the window."""

    @property
    def reads_timestep(self) -> bool:  # type: ignore[override]
        """Only where the window is one of timesteps or noise levels."""
        return self.window == "timestep" or is_threshold(self.start) or is_threshold(self.end)

    @property
    def text(self) -> Text | None:
        """The negative text that was given, encoded."""
        given = self.negative_prompt_embeds
        return Text(given) if isinstance(given, Tensor) else given

    def filled(self, published: Published) -> Self:  # noqa: ARG002
        """With what is published for the family in place of what was not given."""
        return self

    def fit(self, denoiser: nn.Module, pipe: object = None) -> Self:
        """Encode the prompt, fill in what is published for the family, look at the attention processors."""
        network = network_of(denoiser)
        config: Any = denoiser.config
        fitted = replace(self.filled(network.published(config)), network=network)
        check_processors(self, denoiser)
        text, prompts = self.text, self.negative_prompt
        if text is None and prompts is not None and pipe is not None:
            given = [prompts] if isinstance(prompts, str) else list(prompts)
            text = encode(pipe, given, dict(network.outputs), network.encoders)
        check_length(self, denoiser, text)
        width = network.width(denoiser)
        if text is not None and width not in (None, text.embeds.shape[-1]):
            raise ValueError(
                f"{self}: the negative embeddings have {text.embeds.shape[-1]} features, "
                f"{type(denoiser).__name__} takes {width}."
            )
        return replace(fitted, negative_prompt_embeds=text, size=size_of(text, prompts, network, denoiser))

    def check(self, sites: Sequence[Site], model: str) -> None:
        """It needs attention to a text, and the chosen layers."""
        if not any(site.kind in (Kind.CROSS_ATTENTION, Kind.JOINT_ATTENTION) for site in sites):
            raise ValueError(f"{self} needs attention to a text; {model} has none.")
        if not any(self.chooses(site) for site in sites):
            raise ValueError(f"{self}: no attention of {model} is among these layers.")

    def chooses(self, site: Site) -> bool:
        """Whether an attention is among the layers."""
        if site.kind not in (Kind.CROSS_ATTENTION, Kind.JOINT_ATTENTION):
            return False
        return not self.layers or any(
            site.index == layer if isinstance(layer, int) else re.search(layer, site.path) for layer in self.layers
        )

    def asks(self, site: Site) -> bool:
        """The model, for the text; the blocks it runs through beside the image; the chosen attentions."""
        joint = self.network is not None and self.network.joint
        return site.kind is Kind.MODEL or (joint and site.kind is Kind.BLOCK) or self.chooses(site)

    def decide(self, site: Site, step: Step) -> Decision | None:
        """Guide in the window."""
        if self.off or step.pass_ or not self.active(step):
            return None
        return self.steer(site, step)

    def active(self, step: Step) -> bool:
        """Whether a step lies in the window."""
        if self.window == "steps":
            start, end = edges(self.start, self.end, step, self)
            return start <= step.index < end
        if step.timestep is None:
            raise ValueError(f"{self} goes by timesteps: plan(..., scheduler=...) with its timesteps set.")
        flow = self.network is not None and self.network.flow
        assert isinstance(self.start, int | float)
        assert isinstance(self.end, int | float)
        return in_range(step.timestep, self.start, self.end, flow)

    def remark(self, step: Step, notes: Mapping[str, Any]) -> str:  # noqa: ARG002
        """Which steps the window is, where thresholds say so."""
        found = edges(self.start, self.end, step, self)._asdict() if self.window == "steps" else {}
        said = [told(self, name, step, i) for name, i in found.items() if is_threshold(getattr(self, name))]
        return "\n".join(said)


def guidance(method: Steering, site: Site, edit: Edit, doubled: bool = False) -> Decision | None:
    """Guidance by an operator on two outputs, at any site; with the whole batch doubled where streams can differ."""
    if method.network is None or not method.network.joint:
        return Provide(method.size) if site.kind is Kind.MODEL else Guide(edit, method.size)
    if doubled and method.network.rotary:
        at = {Kind.MODEL: Double(method.size), Kind.BLOCK: OneTime()}
        return at.get(site.kind, GuideBoth(edit))
    if site.kind is Kind.MODEL:
        return Accompany(method.size, pooled=method.text is not None and method.text.pooled is not None)
    return Beside(method.size) if site.kind is Kind.BLOCK else GuideJoint(edit)


def finite(name: str, value: float | None, minimum: float) -> None:
    """A number of at least `minimum`, or nothing.

    Raises:
        ValueError: it is not.
    """
    if value is not None and not (math.isfinite(value) and value >= minimum):
        raise ValueError(f"{name} must be a finite number of at least {minimum}, got {value}")
