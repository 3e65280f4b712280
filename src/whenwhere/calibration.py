"""Calibration: how much the contribution of every unit of a network changes from step to step, measured on plain runs.

A unit is what a method may reuse: a residual branch, a block, or an attention layer of a U-Net. What was measured
holds for one model, scheduler, number of steps, guidance scale and size, and says which.
"""

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from .attach import attach
from .decisions.measuring import METRICS, UNITS, Granularity, Metric, Notes, Recorder
from .method import Setting
from .ranges import at_least, one_of
from .setting import differing

_FORMAT = 1  # of the JSON files


@dataclass(frozen=True)
class Calibration:
    """What was measured, and on what.

    Attributes:
        model: class name of the denoiser.
        granularity: the units: "branch" (attention and MLP outputs before their gates), "block" (what a transformer
            block adds to its input) or "layer" (what a spatial transformer of a U-Net adds to its input).
        metric: the measure of change, see `METRICS`.
        setting: steps, scheduler, guidance and size of the runs.
        runs: how many there were.
        changes: for every unit's path the mean change from step s - 1 to step s, for s in 0 ... steps - 1; 0 at the
            first step of a denoiser, which has nothing to be compared with.
        configuration: what the denoiser was made with, as JSON; `None` where it does not tell.

    Raises:
        ValueError: an unknown granularity or metric, no run, no unit, or changes that are not one for every step,
            finite and at least 0.
    """

    model: str
    granularity: Granularity
    metric: Metric
    setting: Setting
    runs: int
    changes: Mapping[str, tuple[float, ...]] = field(repr=False, hash=False)
    configuration: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        one_of("granularity", self.granularity, UNITS)
        one_of("metric", self.metric, METRICS)
        at_least(1, runs=self.runs)
        if not self.changes:
            raise ValueError("a calibration needs changes of at least one unit, got none; measure them by calibrate.")
        for path, row in self.changes.items():
            if len(row) != self.setting.steps:
                raise ValueError(f"{path} has {len(row)} changes, but the runs had {self.setting.steps} steps.")
            wrong = [(s, value) for s, value in enumerate(row) if not (math.isfinite(value) and value >= 0)]
            if wrong:
                raise ValueError(
                    f"changes must be finite and at least 0, got {wrong[0][1]} for {path} at step {wrong[0][0]}; "
                    "calibrate anew."
                )

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps({"whenwhere": _FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no calibration.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            data: dict[str, Any] = json.loads(text)
            if data.pop("whenwhere") != _FORMAT:
                raise ValueError("it was written by another version of the format")
            told: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data["setting"].items()}
            changes = {name: tuple(map(float, row)) for name, row in data["changes"].items()}
            return cls(**{**data, "setting": Setting(**told), "changes": changes})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no saved calibration: {error!r}") from error

    def among(self, names: tuple[str, ...] | None) -> tuple[str, ...]:
        """The paths of the units that have, or lie inside, a module of these names; of all for `None`.

        Raises:
            TypeError: no tuple of paths.
            ValueError: no name, or one without a unit.
        """
        if names is None:
            return tuple(self.changes)
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"units must be a tuple of paths, got {names!r}")
        found = {name: [p for p in self.changes if f"{p}.".startswith(f"{name}.")] for name in names}
        empty = [name for name in names if not found[name]]
        if empty or not names:
            raise ValueError(
                f"units must name modules that were measured; got {', '.join(empty) or 'none'}. Residual networks of a "
                f"U-Net are never reused. There are: {', '.join(self.changes)}."
            )
        return tuple(path for path in self.changes if any(path in paths for paths in found.values()))

    def refuse(self, setting: Setting) -> None:
        """Refuse a generation that differs from the measured ones in anything that is known of both.

        Raises:
            ValueError: it does.
        """
        for name, measured, asked in differing(self.setting, setting):
            raise ValueError(
                f"calibrated with {name} {measured}, but this generation has {asked}; calibrate anew: the changes "
                "between steps depend on it."
            )


def calibrate(
    pipe: Any,
    generate: Callable[[], object],
    granularity: Granularity = "branch",
    metric: Metric = "l1rel",
    **options: Any,
) -> Calibration:
    """Measure the changes of all units while `generate` runs the pipeline, once or many times.

    Args:
        pipe: as for `attach`.
        generate: calls the pipeline with everything as it will be used (steps, guidance scale, size); prompts and seeds
            should vary, and their mean is taken.
        granularity: what is a unit; see `Calibration`.
        metric: what is its change; see `Calibration`.
        options: further arguments of `attach`.

    Raises:
        ValueError: nothing ran to its end, the runs differ in more than prompts and seeds, or something is not finite.
    """
    one_of("granularity", granularity, UNITS)
    one_of("metric", metric, METRICS)
    notes = Notes()
    with attach(pipe, Recorder(granularity, metric, notes), **options):
        generate()
    if not notes.settings:
        raise ValueError("calibration needs runs of one setting; found none.")
    setting, *others = notes.settings
    for name, one, another in (found for other in others for found in differing(setting, other)):
        raise ValueError(f"calibration needs runs of one setting; found {name} {one} and {another}.")
    changes = _changes(notes, setting)
    if notes.silent:
        warnings.warn(
            f"{len(notes.silent)} units add nothing, as untrained gates do: {', '.join(sorted(notes.silent))}",
            stacklevel=2,
        )
    return Calibration(notes.model, granularity, metric, setting, len(notes.settings), changes, notes.configuration)


def _changes(notes: Notes, setting: Setting) -> dict[str, tuple[float, ...]]:
    """The mean change of every unit at every step.

    Raises:
        ValueError: a unit was not measured at every step, or there is only one.
    """
    measured = [s for s in range(1, setting.steps) if s != setting.handover]
    for path in notes.paths:
        times = {notes.rows.get((path, s), 0) for s in measured}
        if len(times) != 1 or 0 in times:
            raise ValueError(
                f"calibration needs runs of at least two steps that were not interrupted; {path} was not measured "
                "equally often at every step."
            )
    mean = {key: total / notes.rows[key] for key, total in notes.sums.items()}
    return {path: tuple(mean.get((path, s), 0.0) for s in range(setting.steps)) for path in notes.paths}
