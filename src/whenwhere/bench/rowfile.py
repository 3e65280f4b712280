"""Files of rows: lines of JSON that only grow, with a folder for the plans and pictures beside them.

The first line says where and how was measured; others say how many cases there will be, and list every variant with its
baselines; all others are rows. A row
is written at once and as a whole, so that a killed run loses at most the row it was writing; such a torn last line is
dropped when the file is opened again. A row knows its job by content, so that a resumed run skips what is finished.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from .environment import Environment
from .rows import Job, Row

_FORMAT = 2
_OPENING = b'{"whenwhere": '


@dataclass(frozen=True)
class Listing:
    """A variant that takes part.

    Attributes:
        method: its expression with every field, as in its rows.
        label: its expression without defaults.
        baselines: expressions of the variants that compute as little in a plain way; empty for a baseline.
    """

    method: str
    label: str
    baselines: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits that name the file of its plan."""
        return hashlib.sha256(self.method.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Content:
    """What a file of rows says.

    Attributes:
        environment: where its rows were measured.
        scores: the optional scores that its rows hold.
        listings: the variants, in the order of their listing.
        rows: in the order of running.
        cases: of every variant, when the run is finished; 0 where nobody said.
    """

    environment: Environment
    scores: tuple[str, ...]
    listings: tuple[Listing, ...]
    rows: tuple[Row, ...]
    cases: int = 0

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file; a torn last line is left out.

        Raises:
            ValueError: it is no file of rows; the message names the first wrong line.
        """
        try:
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no file of rows: it is not text") from error
        if not lines:
            raise ValueError(f"{path} holds no rows.")
        environment, scores = _header(path, lines[0])
        found = [_line(path, number, line) for number, line in enumerate(lines[1:], start=2)]
        listings = {listing.method: listing for listing in found if isinstance(listing, Listing)}
        rows = tuple(row for row in found if isinstance(row, Row))
        cases = max((number for number in found if isinstance(number, int)), default=0)
        return cls(environment, scores, tuple(listings.values()), rows, cases)


class RowFile:
    """A file of rows, opened to go on with it.

    Attributes:
        path: the file; plans and pictures lie in `folder` beside it.
        environment: where its rows were and will be measured.
        rows, listings, cases: what it holds.
    """

    def __init__(
        self, path: Path, environment: Environment, scores: Sequence[str] = (), setting: Job | None = None
    ) -> None:
        """Open a file, or begin one.

        Args:
            path: the file.
            environment: where rows will be measured.
            scores: the optional scores that every row will hold.
            setting: what all rows have in common; `None` leaves that to the caller.

        Raises:
            ValueError: it is no file of rows, or was measured in another environment, setting or with other scores.
        """
        self.path, self.folder, self.environment = path, folder_of(path), environment
        self.rows: list[Row] = []
        self.listings: list[Listing] = []
        self.cases = 0
        if is_new(path):
            header = {"whenwhere": _FORMAT, "environment": asdict(environment), "scores": sorted(scores)}
            path.write_text(json.dumps(header) + "\n", encoding="utf-8")
            return
        content = Content.read(path)
        self.environment, self.rows, self.listings = content.environment, [*content.rows], [*content.listings]
        self.cases = content.cases
        self._refuse(content.environment.differences(environment), "its seconds cannot stand beside new ones")
        if content.scores != tuple(sorted(scores)):
            self._refuse([f"scores {_words(content.scores)} and {_words(scores)}"], "its rows hold other scores")
        if setting is not None and self.rows:
            self._refuse(self.rows[0].job.setting.differences(setting), "rows of two settings must not be mixed")
        os.truncate(path, len(path.read_bytes().rpartition(b"\n")[0]) + 1)

    @property
    def finished(self) -> set[Job]:
        """The jobs that need not be run again."""
        return {row.job for row in self.rows}

    def append(self, row: Row) -> None:
        """Write a row so that it survives whatever happens next."""
        self._write(row.to_json())
        self.rows.append(row)

    def expect(self, cases: int) -> None:
        """Write down how many cases every variant will have, where they are more than known before."""
        if cases > self.cases:
            self._write(json.dumps({"cases": cases}))
            self.cases = cases

    def list(self, listing: Listing) -> None:
        """Write down a variant, once."""
        if listing not in self.listings:
            self._write(json.dumps({"variant": asdict(listing)}, ensure_ascii=False))
            self.listings.append(listing)

    def _write(self, line: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _refuse(self, differences: Sequence[str], reason: str) -> None:
        if differences:
            raise ValueError(
                f"{self.path} was measured otherwise ({'; '.join(differences)}): {reason}. Write to another file."
            )


def is_new(path: Path) -> bool:
    """Whether a file does not exist, is empty, or is no more than the torn first line of a file of rows."""
    if not path.exists():
        return True
    content = path.read_bytes()
    return b"\n" not in content and content[: len(_OPENING)] == _OPENING[: len(content)]


def folder_of(path: Path) -> Path:
    """Where the plans and pictures of a file of rows lie: "rows.jsonl" -> "rows.files"."""
    return path.with_suffix(".files")


def _words(scores: Sequence[str]) -> str:
    return ", ".join(sorted(scores)) or "none"


def _header(path: Path, line: str) -> tuple[Environment, tuple[str, ...]]:
    try:
        header = json.loads(line)
        if header["whenwhere"] != _FORMAT:
            raise ValueError("written by another version of the format")
        return Environment(**header["environment"]), tuple(header["scores"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}, line 1: no header of a file of rows ({error!r})") from error


def _line(path: Path, number: int, line: str) -> Listing | Row | int:
    try:
        values = json.loads(line)
        if set(values) == {"cases"}:
            return int(values["cases"])
        if "variant" in values:
            listed = values["variant"]
            return Listing(listed["method"], listed["label"], tuple(listed["baselines"]))
        return Row.from_json(values)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}, line {number}: no row ({error})") from error
