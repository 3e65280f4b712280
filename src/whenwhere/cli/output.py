"""What commands write: files that appear as a whole or not at all, JSON, numbers for readers."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from ..bench.replacing import replacing as replacing


def console() -> Console:
    """Standard output, as wide as the terminal where it is one, wide enough for tables where it is not."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on standard error; call what is yielded before every piece of work with its name."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        begun = False

        def advance(name: str) -> None:
            nonlocal begun
            bar.update(task, description=name, advance=1 if begun else 0)
            begun = True

        yield advance


def print_json(value: object) -> None:
    """A value as JSON on standard output, and nothing else."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def check_file(path: Path, *suffixes: str) -> None:
    """See that a file can be written, before anything runs.

    Raises:
        ValueError: its folder does not exist or is not writable, it is a folder, or its name does not end as it should.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{path} must end in {' or '.join(suffixes)}.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"the folder {path.parent} does not exist.")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """See that a folder can be written to, or made, before anything runs.

    Raises:
        ValueError: something on its way is no folder, or is not writable.
    """
    nearest = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise ValueError(f"{nearest} is no folder.")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"the folder {nearest} is not writable.")


def slug(text: str) -> str:
    """A text as part of a file name: "red apple, noto style" -> "red-apple-noto-style"."""
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-")[:60] or "picture"


def macs(number: int) -> str:
    """Multiply-adds with three digits and a unit."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def memory(size: int) -> str:
    """Bytes with a unit; a dash for none."""
    for unit, step in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= step:
            return f"{size / step:.3g} {unit}"
    return f"{size} B" if size else "–"


def seconds(value: float) -> str:
    """Seconds with three digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
