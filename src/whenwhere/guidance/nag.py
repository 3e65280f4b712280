"""NAG, NASA, VSF: methods that steer away from a negative text inside attention, at every number of steps.

NAG: normalized attention guidance for few-step models (Chen et al., 2025, https://arxiv.org/abs/2505.21179). The same
image queries attend to the positive and to the negative text; the outputs are extrapolated, every token's norm is
bounded, and the result is blended with the positive output. NASA subtracts instead (Nguyen et al., 2024,
https://arxiv.org/abs/2412.02687); VSF flips the sign of the negative text's values within one attention (Guo and Du,
2025, https://arxiv.org/abs/2508.10931).
"""

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, replace
from typing import Literal, Self

from ..clock import Step
from ..decision import Decision
from ..ranges import one_of
from ..site import Kind, Site
from .append import Append
from .edits import Edit, Normalized, Subtracted
from .network import Published
from .operator import Norm
from .provide import Provide
from .steering import Steering, finite, guidance

# What is used before a method is fitted to a model.
_UNFITTED = Published(5.0, 2.5, 0.25)


@dataclass(frozen=True)
class NAG(Steering):
    """Normalized attention guidance.

    Z = alpha G min(R, tau) / R + (1 - alpha) Z+ with G = s Z+ - (s - 1) Z- and R = ||G|| / ||Z+|| for every token.

    Attributes:
        scale: s = phi + 1, at least 1 (off); the paper's phi is one less. If not given, as published for the family.
        tau: the most that a token's norm may grow, at least 1. If not given, as published.
        alpha: weight of the guided output, in [0, 1]; 0 is off. If not given, as published.
        norm: "l1" as in the paper, "l2" as in the authors' first code for Flux.
        phi: the paper's scale, in place of `scale`.
        mode: of transformers in which text and image share the single blocks (Flux). "shared": one image stream, as in
            the paper's equations; "reference": one for each text, as in the authors' code, at twice the cost.

    Raises:
        ValueError: a field out of range; both `scale` and `phi`.
    """

    scale: float | None = None
    tau: float | None = None
    alpha: float | None = None
    norm: Norm = "l1"
    phi: InitVar[float | None] = None
    mode: Literal["shared", "reference"] = "shared"

    def __post_init__(self, phi: float | None) -> None:
        super().__post_init__()
        if phi is not None:
            if self.scale is not None:
                raise ValueError(f"scale is phi + 1: give one of them, got scale={self.scale} and phi={phi}")
            object.__setattr__(self, "scale", phi + 1)
        for name, minimum in (("scale", 1.0), ("tau", 1.0), ("alpha", 0.0)):
            finite(name, getattr(self, name), minimum)
        if self.alpha is not None and self.alpha > 1:
            raise ValueError(f"alpha must be at most 1, got {self.alpha}")
        one_of("norm", self.norm, ("l1", "l2"))
        one_of("mode", self.mode, ("shared", "reference"))

    @property
    def off(self) -> bool:
        """Whether it changes nothing."""
        return self.scale == 1 or self.alpha == 0

    def steer(self, site: Site, step: Step) -> Decision | None:  # noqa: ARG002
        """Guide with the operator."""
        return guidance(self, site, self.edit, doubled=self.mode == "reference")

    @property
    def edit(self) -> Edit:
        """The operator with its settings."""
        given = (self.scale, self.tau, self.alpha)
        s, t, a = (own if value is None else value for own, value in zip(_UNFITTED, given, strict=True))
        return Normalized(s, t, a, self.norm)

    def filled(self, published: Published) -> Self:
        """With what is published for the family in place of what was not given."""
        missing = {name: value for name, value in published._asdict().items() if getattr(self, name) is None}
        return replace(self, **missing)


@dataclass(frozen=True)
class NASA(Steering):
    """Negative-away steer attention: Z = Z+ - phi Z-, without any bound. Meant for one-step U-Nets.

    Attributes:
        phi: at least 0; 0 is off.
    """

    phi: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        finite("phi", self.phi, 0.0)

    @property
    def off(self) -> bool:
        """Whether it changes nothing."""
        return self.phi == 0

    def steer(self, site: Site, step: Step) -> Decision | None:  # noqa: ARG002
        """Guide with the operator."""
        return guidance(self, site, Subtracted(self.phi))


@dataclass(frozen=True)
class VSF(Steering):
    """Value sign flip: Z = sum of p_j v_j over positive tokens minus a times that over negative ones, one softmax.

    It stands for guidance: run the pipeline without, at `guidance_scale=1`.

    Attributes:
        scale: a, at least 0. Published: 3 to 3.5, and 1.7 for Wan.
        offset: b, what is taken off the negative logits, at least 0. Published: 0.08 to 0.2.
    """

    scale: float = 3.0
    offset: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        finite("scale", self.scale, 0.0)
        finite("offset", self.offset, 0.0)

    def check(self, sites: Sequence[Site], model: str) -> None:
        """It needs cross-attention: in joint attention the texts would have to be kept from seeing each other."""
        if not any(site.kind is Kind.CROSS_ATTENTION for site in sites):
            raise ValueError(f"{self} is made for cross-attention, which {model} has not; NAG and NASA work on it.")
        super().check(sites, model)

    @property
    def off(self) -> bool:
        """Never: even at a = 0 the negative text takes its share of the softmax."""
        return False

    def steer(self, site: Site, step: Step) -> Decision:
        """Append the negative text."""
        if step.branches > 1:
            raise ValueError(f"{self} stands for guidance; run the pipeline with guidance_scale=1.")
        return Append(self.scale, self.offset, self.size) if site.kind is not Kind.MODEL else Provide(self.size)
