"""Measuring: decisions that compute everything and note how much a unit's contribution changed since the step before.

The latents are those of the plain pipeline, bit for bit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ..clock import Step
from ..decision import Call, Decision, Output, Slot, map_tensors
from ..method import Method, Setting
from ..setting import configuration_of
from ..site import Kind, Site
from .change import entering, minus

Granularity = Literal["branch", "block", "layer"]
Metric = Literal["l1rel", "l2rel", "cosine"]

UNITS: Mapping[str, frozenset[Kind]] = {
    "branch": frozenset({Kind.SELF_ATTENTION, Kind.CROSS_ATTENTION, Kind.JOINT_ATTENTION, Kind.MLP}),
    "block": frozenset({Kind.BLOCK}),
    "layer": frozenset({Kind.LAYER}),  # of which only those around transformer blocks: never residual networks
}
_TINY = 1e-12


def units(sites: Sequence[Site], granularity: Granularity) -> tuple[str, ...]:
    """The paths of all units of a model, in the order of execution."""
    blocks = [site for site in sites if site.kind is Kind.BLOCK]
    return tuple(
        site.path
        for site in sites
        if site.kind in UNITS[granularity]
        and (site.kind is not Kind.LAYER or any(block.inside(site) for block in blocks))
    )


@dataclass
class Notes:
    """What is written down while measuring.

    Attributes:
        model, paths: the denoiser's class name, and its units.
        configuration: what the denoiser was made with.
        settings: of every run.
        sums, rows: by path and step, the changes of all rows together, and how many rows that were.
        silent: paths of units that put out nothing but zeros.
    """

    model: str = ""
    paths: tuple[str, ...] = ()
    configuration: str | None = None
    settings: list[Setting] = field(default_factory=list)
    sums: dict[tuple[str, int], float] = field(default_factory=dict)
    rows: dict[tuple[str, int], int] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Recorder(Method):
    """Computes everything, and notes how much every unit changed. The one method that carries a notebook."""

    granularity: Granularity
    metric: Metric
    notes: Notes = field(repr=False)

    kinds: ClassVar = frozenset().union(*UNITS.values())
    reads_timestep: ClassVar = True  # to tell them

    def fit(self, denoiser: nn.Module, pipe: object = None) -> Self:  # noqa: ARG002
        """Note what the denoiser was made with."""
        self.notes.configuration = configuration_of(denoiser)
        return self

    def check(self, sites: Sequence[Site], model: str) -> None:
        """There must be units of this granularity."""
        self.notes.model, self.notes.paths = model, units(sites, self.granularity)
        if not self.notes.paths:
            raise ValueError(f"{model} has no units of granularity {self.granularity!r}.")

    def asks(self, site: Site) -> bool:
        """The units."""
        return bool(site.path) and site.path in self.notes.paths

    def review(self, setting: Setting) -> None:
        """Note the setting."""
        self.notes.settings.append(setting)

    def settle(self, setting: Setting) -> None:
        """Note it with its branches."""
        self.notes.settings[-1] = setting

    def decide(self, site: Site, step: Step) -> Decision | None:  # noqa: ARG002
        """Measure, at every step."""
        return Measure(self)


@dataclass(frozen=True, slots=True)
class Measure(Decision):
    """Run the unit and note how much its contribution changed since the step before."""

    recorder: Recorder

    symbol: ClassVar[str] = "?"
    name: ClassVar[str] = "measured"

    def apply(self, call: Call, slot: Slot) -> Output:
        """Run, compare, remember."""
        output, notes = call.run(), self.recorder.notes
        contribution = output if self.recorder.granularity == "branch" else minus(output, entering(call, output))
        if not slot.empty:
            changes, silent = change(slot.get(call), contribution, self.recorder.metric)
            if not changes.isfinite().all():
                raise ValueError(
                    f"step {call.step.index}: the output of {call.site} is not finite; nothing to calibrate."
                )
            key = call.site.path, call.step.index
            notes.sums[key] = notes.sums.get(key, 0.0) + float(changes.sum())
            notes.rows[key] = notes.rows.get(key, 0) + len(changes)
            notes.silent |= {call.site.path} if silent else set()
        slot.put(contribution, call)
        return output


def change(before: Output, now: Output, metric: Metric) -> tuple[Tensor, bool]:
    """The change of every row, (R,), and whether there is a row that is nothing but zeros.

    Args:
        before, now: contributions at two steps, nested alike; all tensors have R rows, which are taken together.
        metric: which; see `METRICS`.
    """
    old, new = _flat(before), _flat(now)  # (R, n)
    return METRICS[metric](old, new), bool((new == 0).all(1).any())


# L1rel of Block Caching (https://arxiv.org/abs/2312.03209): || C(t) - C(t - 1) ||_1 / || C(t) ||_1
METRICS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1rel": lambda old, new: (new - old).abs().sum(1) / new.abs().sum(1).clamp_min(_TINY),
    "l2rel": lambda old, new: (new - old).norm(dim=1) / new.norm(dim=1).clamp_min(_TINY),
    "cosine": lambda old, new: _angular(old, new),
}


def _angular(old: Tensor, new: Tensor) -> Tensor:
    """1 - cos, in [0, 2]; 0 between two that are nothing but zeros, whose angle is not defined."""
    something = (old != 0).any(1) | (new != 0).any(1)
    return (1 - torch.cosine_similarity(new, old, dim=1, eps=_TINY)).clamp_min(0) * something


def _flat(value: Output) -> Tensor:
    """All tensors of a nested value side by side, (R, n), in single precision."""
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor.flatten(1).float())
        return tensor

    map_tensors(value, note)
    return torch.cat(tensors, 1)
