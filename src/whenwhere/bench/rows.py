"""Rows: one measured run each, as lines of JSON in a file that only grows.

The first line of a file says where it was measured. A row is written at once and as a whole, so that a killed run loses
at most the row it was writing; such a torn last line is dropped when the file is opened again. A row knows the job it
answers by content, so that a resumed run skips what is finished.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from .environment import Environment

_FORMAT = 1


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


@dataclass(frozen=True)
class Row:
    """One measured run.

    Attributes:
        job: what was run.
        seconds, denoising: end to end, and the steps alone.
        evaluations: updates of the sample.
        macs, macs_papers: planned multiply-adds of the denoiser: all, and without attention's two products.
        counted, counted_papers: the same as they happened; `None` if nobody counted.
        bytes, held: the most bytes that the memory holds, planned and measured.
        peak_memory: the most bytes allocated on the accelerator; `None` on the CPU.
        psnr, ssim: against the plain run of the same prompt and seed; `None` for that run itself.
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
    psnr: float | None
    ssim: float | None

    def to_json(self) -> str:
        """One line. Infinity, the PSNR of identical pictures, is written as a word: JSON has no such number."""
        values = asdict(self)
        values = values.pop("job") | values
        if any(isinstance(value, float) and math.isnan(value) for value in values.values()):
            raise ValueError(f"a row must not hold a number that is none: {values}")
        words = {key: "inf" if value == math.inf else value for key, value in values.items()}
        return json.dumps(words, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """A row from what `to_json` wrote.

        Raises:
            ValueError: a field is missing, unknown or not a number.
        """
        names = {field.name for field in fields(Job)}
        own = {field.name for field in fields(cls)} - {"job"}
        if set(values) != names | own:
            raise ValueError(f"fields {', '.join(sorted(set(values) ^ (names | own)))} are missing or unknown")
        results: dict[str, Any] = {name: math.inf if values[name] == "inf" else values[name] for name in own}
        if any(isinstance(value, float) and math.isnan(value) for value in results.values()):
            raise ValueError("a number is not a number")
        return cls(Job(**{name: values[name] for name in names}), **results)


class RowFile:
    """A file of rows, opened to go on with it.

    Attributes:
        environment: where its rows were and will be measured.
        rows: what it holds.
    """

    def __init__(self, path: Path, environment: Environment) -> None:
        """Open a file, or begin one.

        Raises:
            ValueError: it is no file of rows, or was measured in another environment.
        """
        self.path, self.environment = path, environment
        self.rows: list[Row] = []
        if not path.exists() or not path.read_text(encoding="utf-8").partition("\n")[1]:
            header = {"whenwhere": _FORMAT, "environment": asdict(environment)}
            path.write_text(json.dumps(header) + "\n", encoding="utf-8")
            return
        self.environment, self.rows = read(path)
        if different := self.environment.differences(environment):
            raise ValueError(
                f"{path} was measured elsewhere ({'; '.join(different)}): its seconds cannot stand beside new ones. "
                "Write to another file."
            )
        whole = path.read_bytes().rpartition(b"\n")[0] + b"\n"
        os.truncate(path, len(whole))

    @property
    def finished(self) -> set[Job]:
        """The jobs that need not be run again."""
        return {row.job for row in self.rows}

    def append(self, row: Row) -> None:
        """Write a row so that it survives whatever happens next."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(row.to_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)


def read(path: Path) -> tuple[Environment, list[Row]]:
    """The environment and the rows of a file; a torn last line is left out.

    Raises:
        ValueError: it is no file of rows; the message names the first wrong line.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    if not lines:
        raise ValueError(f"{path} holds no rows.")
    return _environment(path, lines[0]), list(_rows(path, lines[1:]))


def _environment(path: Path, line: str) -> Environment:
    try:
        header = json.loads(line)
        if header["whenwhere"] != _FORMAT:
            raise ValueError("written by another version of the format")
        return Environment(**header["environment"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}, line 1: no header of a file of rows ({error!r})") from error


def _rows(path: Path, lines: list[str]) -> Iterable[Row]:
    for number, line in enumerate(lines, start=2):
        try:
            yield Row.from_json(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no row ({error})") from error
