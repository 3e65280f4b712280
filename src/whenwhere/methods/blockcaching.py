"""Block Caching, of "Cache me if you can" (Wimbauer et al., CVPR 2024, https://arxiv.org/abs/2312.03209).

How much the contribution of a unit changes from step to step is smooth, small at most steps and different for every
unit. It is measured once, on plain runs; then each unit is reused until the changes since it was computed add up to
more than a threshold. The schedule is fixed before sampling.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from ..calibration import Calibration
from ..clock import Step
from ..decision import Compute, Decision, Reuse, whole
from ..decisions.adjusted import AddAdjusted, ReuseAdjusted
from ..decisions.change import AddChange, KeepChange
from ..decisions.measuring import units
from ..decisions.scaleshift import ScaleShift
from ..method import Method, Setting
from ..planning import plan
from ..ranges import at_least
from ..setting import refuse_another
from ..site import Kind, Site

_BISECTIONS = 12


@dataclass(frozen=True)
class BlockCaching(Method):
    """Block Caching.

    Attributes:
        calibration: what `whenwhere.calibrate` measured, or the path of the file that it was saved to.
        threshold: delta, at least 0: how much a unit may have changed, by the sum of the measured changes, before it is
            computed again. 0 is the plain run, infinity computes the first step only. Published: 0.5 for a U-Net.
        strict: compute one step before the sum exceeds the threshold, as the paper's inequality can also be read.
        max_age: at least 1: at most so many steps in a row are reused; `None` for no limit.
        scale_shift: what adjusts the reused contributions, by timestep; a `ScaleShift` that
            `whenwhere.train.scaleshift.train_scale_shift` trained for this schedule, or the path of its file.
        units: paths of the units that may be reused, or of modules around them; `None` for all that were measured.

    Raises:
        ValueError: a field out of range; a calibration or a scale and shift of another model or schedule; a generation
            of another setting.
        TypeError: a field of the wrong type.
        FileNotFoundError: there is no such file.
    """

    calibration: Calibration | str | Path
    threshold: float = 0.5
    strict: bool = False
    max_age: int | None = None
    scale_shift: ScaleShift | str | Path | None = None
    units: tuple[str, ...] | None = None

    kinds: ClassVar = frozenset(Kind) - {Kind.MODEL, Kind.CONTROL, Kind.SCHEDULER, Kind.STEM, Kind.STAGE}
    idle_reason: ClassVar = "every measured change is above the threshold."

    def __post_init__(self) -> None:
        if not isinstance(self.measured, Calibration):
            raise TypeError(f"calibration must be a Calibration or the path of one, got {self.calibration!r}")
        if not isinstance(self.threshold, int | float) or isinstance(self.threshold, bool):
            raise TypeError(f"threshold must be a number, got {self.threshold!r}")
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {self.threshold}")
        if self.max_age is not None:
            at_least(1, max_age=self.max_age)
        self.measured.among(self.units)
        if self.adjustment is not None and self.adjustment.computed != self.table():
            raise ValueError(
                f"{self.adjustment} was trained for another schedule than these fields make; train one for this "
                "calibration, threshold, strict, max_age and units."
            )

    @cached_property
    def measured(self) -> Calibration:
        """The calibration, read from its file if need be."""
        path = self.calibration
        return Calibration.load(path) if isinstance(path, str | Path) else path

    @cached_property
    def adjustment(self) -> ScaleShift | None:
        """The scale and shift, read from its file if need be."""
        path = self.scale_shift
        return ScaleShift.load(path) if isinstance(path, str | Path) else path

    @property
    def reads_timestep(self) -> bool:  # type: ignore[override]
        """A scale and shift is for certain timesteps."""
        return self.adjustment is not None

    @cached_property
    def chosen(self) -> tuple[str, ...]:
        """The paths of the units that may be reused."""
        return self.measured.among(self.units)

    def table(self) -> dict[str, str]:
        """The steps at which every unit is computed that may be reused, as `"#..#"`, by path."""
        return {path: "".join("#" if full else "." for full in self._schedule(path)) for path in self.chosen}

    def _schedule(self, path: str) -> tuple[bool, ...]:
        changes, handover = self.measured.changes[path], self.measured.setting.handover
        return schedule(changes, self.threshold, self.strict, self.max_age, handover)

    @classmethod
    def for_speedup(cls, model: Any, calibration: Calibration | str | Path, speedup: float, **fields: Any) -> Self:
        """The method with the smallest threshold that plans so many times fewer multiply-adds, found by bisection.

        Args:
            model: as for `whenwhere.plan`, which counts without guidance scale or size.
            calibration: of this model.
            speedup: above 1.
            fields: the other fields.

        Raises:
            ValueError: not even reusing everything is so fast.
        """

        def ratio(threshold: float) -> float:
            method = cls(calibration, threshold, **fields)
            return plan(model, method, steps=method.measured.setting.steps).priced.ratio

        low, high = 0.0, sum(max(row) for row in zip(*cls(calibration).measured.changes.values(), strict=True)) + 1.0
        if not 1 < speedup <= ratio(high):
            raise ValueError(f"speedup must be above 1 and at most {ratio(high):.3g}, got {speedup}")
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if ratio(middle) >= speedup else (middle, high)
        return cls(calibration, high, **fields)

    def asks(self, site: Site) -> bool:
        """The units that may be reused."""
        return bool(site.path) and site.path in self.chosen

    def fit(self, denoiser: nn.Module, pipe: object = None) -> Self:  # noqa: ARG002
        """Calibration, scale and shift must be of a model that was made like this one."""
        if self.measured.model == type(denoiser).__name__:  # another class is refused by `check`
            refuse_another("the calibration", self.measured.configuration, denoiser)
            if self.adjustment is not None:
                refuse_another("the scale and shift", self.adjustment.configuration, denoiser)
        return self

    def check(self, sites: Sequence[Site], model: str) -> None:
        """The calibration must be of this model."""
        found, present = self.measured, units(sites, self.measured.granularity)
        if found.model != model or set(found.changes) != set(present):
            raise ValueError(
                f"the calibration is of {found.model} with {len(found.changes)} units, this {model} has "
                f"{len(present)} or others; calibrate this model."
            )

    def review(self, setting: Setting) -> None:
        """The generation must be as those that were measured."""
        self.measured.refuse(setting)
        if self.adjustment is not None:
            self.adjustment.refuse(setting)

    def settle(self, setting: Setting) -> None:
        """So must be its branches."""
        self.measured.refuse(setting)

    def decide(self, site: Site, step: Step) -> Decision | None:
        """Compute and keep what has changed too much, reuse the rest."""
        full, adjustment = self._schedule(site.path)[step.index], self.adjustment
        if self.measured.granularity == "branch":
            reuse: Decision = Reuse() if adjustment is None else ReuseAdjusted(scale_shift=adjustment)
            return Compute(whole) if full else reuse
        add: Decision = AddChange() if adjustment is None else AddAdjusted(scale_shift=adjustment)
        return KeepChange() if full else add


@cache
def schedule(
    changes: tuple[float, ...],
    threshold: float,
    strict: bool = False,
    max_age: int | None = None,
    handover: int | None = None,
) -> tuple[bool, ...]:
    """The steps at which a unit is computed.

    Args:
        changes: from step s - 1 to step s; the first one does not count.
        threshold, strict, max_age: as in `BlockCaching`.
        handover: the step at which a second denoiser takes over, which has nothing to reuse.
    """
    full, drift, age = [True], 0.0, 0
    for s in range(1, len(changes)):
        drift, age = drift + changes[s], age + 1
        ahead = changes[s + 1] if strict and s + 1 < len(changes) else 0.0
        due = threshold == 0 or drift + ahead > threshold or (max_age is not None and age > max_age)
        full.append(due or s == handover)
        if full[-1]:
            drift, age = 0.0, 0
    return tuple(full)
