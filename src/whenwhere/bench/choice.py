"""Choices: what `whenwhere tune` found, as a file that says what to attach and what was measured."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from ..expression import Item, parse, write
from ..method import Method
from .intervals import Interval

_FORMAT = 1  # of the JSON files

Verdict = Literal["beaten", "not shown", "ahead"]


@dataclass(frozen=True)
class Rival:
    """One way to compute as little, beside the choice, on prompts and seeds that nobody tuned on.

    Attributes:
        name: for readers.
        label: its expression, without defaults.
        macs_ratio: how many times fewer multiply-adds than plain are planned.
        speed_up: seconds of plain over its own, medians.
        psnr, ssim: against the plain pictures, medians; a PSNR above 100 dB counts as 100.
        lead: by how many dB the choice's pictures are closer to the plain ones, median over pairs.
    """

    name: str
    label: str
    macs_ratio: float
    speed_up: Interval
    psnr: Interval
    ssim: Interval
    lead: Interval

    @property
    def verdict(self) -> Verdict:
        """Whether it is beaten: whether the interval of the lead lies on one side of zero."""
        low, high = self.lead.low, self.lead.high
        if low is None or high is None:
            return "not shown"
        return "beaten" if low > 0 else "ahead" if high < 0 else "not shown"


@dataclass(frozen=True)
class Choice:
    """What to attach, for one model, scheduler and number of steps.

    Attributes:
        model, revision, scheduler: what was tuned; a name, a hash of its files, a class.
        steps, guidance: of the generation.
        goal: what was asked for, as "speedup 1.8".
        expression: the methods, with every field.
        calibration: path of the measured changes that they read; empty for none.
        own: the choice itself, measured on held-out prompts and seeds.
        rivals: published defaults at equal cost, fewer steps, guidance stopped; measured in the same turns.
        said: what has to be said, a sentence each.
        environment: where it was measured.
    """

    model: str
    revision: str
    scheduler: str
    steps: int
    guidance: float
    goal: str
    expression: str
    calibration: str
    own: Rival
    rivals: tuple[Rival, ...]
    said: tuple[str, ...]
    environment: Mapping[str, Any]

    @property
    def items(self) -> tuple[Item, ...]:
        """The methods, the outermost first."""
        return parse(self.expression)

    @property
    def methods(self) -> tuple[Method, ...]:
        """What is attached: `attach(pipe, *choice.methods)`."""
        return tuple(item for item in self.items if isinstance(item, Method))

    @property
    def python(self) -> str:
        """The choice as a line of Python."""
        names = ", ".join(sorted({"attach", *(type(item).__name__ for item in self.items)}))
        return f"from whenwhere import {names}; attach(pipe, {write(self.items).replace(')+', '), ')})"

    def save(self, path: str | Path) -> None:
        """Write it as JSON. Measured changes are named as lying beside it."""
        name = Path(self.calibration).name if self.calibration else ""
        text = self.expression.replace(repr(self.calibration), repr(name)) if name else self.expression
        data = asdict(self) | {"expression": text, "calibration": name}
        Path(path).write_text(json.dumps({"whenwhere": _FORMAT, **data}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file, or not the measured changes that it names.
            ValueError: it is no choice, or names methods that are not known.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            data: dict[str, Any] = json.loads(text)
            if data.pop("whenwhere") != _FORMAT:
                raise ValueError("it was written by another version of the format")
            name = data["calibration"]
            found = str(Path(path).parent / name) if name else ""
            data |= {"expression": data["expression"].replace(repr(name), repr(found)) if name else data["expression"]}
            rivals = tuple(map(_rival, data["rivals"]))
            own, said = _rival(data["own"]), tuple(data["said"])
            choice = cls(**{**data, "calibration": found, "own": own, "rivals": rivals, "said": said})
            assert choice.methods, "it names no method"
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} names measured changes that are not there: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise ValueError(f"{path} is no saved choice: {error!r}; `whenwhere tune` writes one.") from error
        return choice


def load_choice(path: str | Path) -> Choice:
    """What `whenwhere tune` wrote: `attach(pipe, *load_choice("choice.json").methods)`.

    Raises:
        FileNotFoundError: there is no such file, or not the measured changes that it names.
        ValueError: it is no choice.
    """
    return Choice.load(path)


def _rival(data: dict[str, Any]) -> Rival:
    intervals = {name: Interval(**data[name]) for name in ("speed_up", "psnr", "ssim", "lead")}
    return Rival(**{**data, **intervals})
