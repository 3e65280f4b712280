"""Rows: one measured run each, as a line of JSON that says by content which job it answers."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self


@dataclass(frozen=True)
class Job:
    """What a row is a measurement of.

    Attributes:
        model, revision: the name and a hash of the files.
        dtype: the type of the denoiser's numbers.
        scheduler: its class.
        method: the expression with every field; "plain" for none.
        prompt, negative, seed, steps, guidance: what was asked for.
        height, width: in pixels; 0 for the model's own size.
        run: number of the repetition, from 0.
    """

    model: str
    revision: str
    dtype: str
    scheduler: str
    method: str
    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    height: int
    width: int
    run: int

    @property
    def setting(self) -> "Job":
        """What all rows that stand side by side have in common: the job without method, prompt, seed and run."""
        return replace(self, method="", prompt="", seed=0, run=0)

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits that name the picture of this job, whichever repetition drew it."""
        text = json.dumps(asdict(replace(self, run=0)), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self, other: "Job") -> list[str]:
        """What is not the same in two jobs, as "steps 20 and 25"."""
        ours, theirs = asdict(self), asdict(other)
        return [f"{name} {ours[name]} and {theirs[name]}" for name in ours if ours[name] != theirs[name]]


@dataclass(frozen=True)
class Row:
    """One measured run.

    Attributes:
        job: what was run.
        seconds, denoising: end to end, and the steps alone.
        evaluations: updates of the sample.
        macs, macs_papers: planned multiply-adds of the denoiser: all, and without attention's two products. Where a
            method decides while it runs, those of what it decided for this picture.
        counted, counted_papers: the same as they happened; `None` if nobody counted.
        bytes, held: the most bytes that the memory holds, planned and measured.
        peak_memory: the most bytes allocated on the accelerator; `None` on the CPU.
        resident: by how many bytes the process grew at most while it ran; `None` where the system does not tell.
        psnr, ssim: against the plain run of the same prompt and seed; `None` for that run itself.
        feature_distance, lpips: the same comparison by networks; `None` also where nobody asked.
        agreement, clip_score: of the picture with its prompt; `None` where nobody asked.
    """

    job: Job
    seconds: float
    denoising: float
    evaluations: int
    macs: int
    macs_papers: int
    counted: int | None
    counted_papers: int | None
    bytes: int
    held: int
    peak_memory: int | None
    resident: int | None
    psnr: float | None
    ssim: float | None
    feature_distance: float | None = None
    lpips: float | None = None
    agreement: float | None = None
    clip_score: float | None = None

    def reproducible(self) -> "Row":
        """The row without what no two runs have in common: seconds and the memory of the process."""
        return replace(self, seconds=0.0, denoising=0.0, peak_memory=None, resident=None)

    def to_json(self) -> str:
        """One line. Infinity, the PSNR of identical pictures, is written as a word: JSON has no such number."""
        values = asdict(self)
        values = values.pop("job") | values
        if wrong := [name for name, value in values.items() if _no_number(name, value)]:
            raise ValueError(f"a row must not hold a number that is none: {', '.join(wrong)} in {values}")
        words = {key: "inf" if value == math.inf else value for key, value in values.items()}
        return json.dumps(words, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """A row from what `to_json` wrote.

        Raises:
            ValueError: a field is missing, unknown, of the wrong kind or not a number.
        """
        kinds = {field.name: field.type for field in (*fields(Job), *fields(cls)) if field.name != "job"}
        if set(values) != set(kinds):
            raise ValueError(f"fields {', '.join(sorted(set(values) ^ set(kinds)))} are missing or unknown")
        values = values | ({"psnr": math.inf} if values["psnr"] == "inf" else {})
        for name, kind in kinds.items():
            wanted: Any = kind if kind in (str, int, int | None) else kind | int  # JSON writes 3.0 also as 3
            if not isinstance(values[name], wanted):
                raise ValueError(f"{name} is {values[name]!r}")
            if _no_number(name, values[name]):
                raise ValueError(f"{name} is {values[name]}, not a number")
        job = {field.name: values[field.name] for field in fields(Job)}
        return cls(Job(**job), **{name: value for name, value in values.items() if name not in job})


def _no_number(name: str, value: object) -> bool:
    """Whether a float is NaN or infinite; only the PSNR of identical pictures may be."""
    return isinstance(value, float) and not math.isfinite(value) and (name, value) != ("psnr", math.inf)
