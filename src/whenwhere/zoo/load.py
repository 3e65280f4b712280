"""Load the models that come with the library; every file is checked against the catalogue first."""

import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers.utils import logging

from whenwhere.spelling import did_you_mean
from whenwhere.zoo.catalog import CATALOG, Entry


def names() -> list[str]:
    """The models of the zoo, sorted."""
    return sorted(CATALOG)


def entry(name: str) -> Entry:
    """What the catalogue says about a model; an unknown name raises ValueError with the nearest known one."""
    if name in CATALOG:
        return CATALOG[name]
    raise ValueError(f"the zoo has no model {name!r}{did_you_mean(name, CATALOG)} It has: {', '.join(names())}")


def path(name: str) -> Path:
    """The folder of a model, which `from_pretrained` of its pipeline class reads too."""
    return Path(__file__).parent / entry(name).folder


def load(name: str) -> DiffusionPipeline:
    """The pipeline of this name in float32, on the CPU, with its progress bar off; `entry(name).pipeline` is its class.

    Raises ValueError for an unknown name, FileNotFoundError for a missing file and RuntimeError for a changed one.
    """
    folder = path(name)
    check(entry(name), folder)
    with silence():
        pipeline = assemble(entry(name).pipeline, folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assemble(kind: str, folder: Path) -> DiffusionPipeline:
    """A pipeline class of diffusers with the parts that a folder names, in float32.

    Networks of this library may stand in its slots, of which the stock loader would complain.
    """
    made: Any = getattr(diffusers, kind)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    slots = inspect.signature(made.__init__).parameters
    return made(**{slot: _part(folder / slot, index[slot]) for slot in slots if slot in index})


def _part(folder: Path, named: Any) -> Any:
    """What the index says of a slot: library and class of a part in a folder of its own, or a plain value."""
    if not isinstance(named, list):
        return named
    library, name = named
    if library is None:
        return None
    kind = getattr(import_module(library), name)
    numbers = {"dtype": torch.float32} if issubclass(kind, nn.Module) else {}
    return kind.from_pretrained(folder, **numbers)


@contextmanager
def silence() -> Iterator[None]:
    """No loading bars inside this block."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check(model: Entry, folder: Path) -> None:
    """Compare every file of a model with its hash in the catalogue; the first difference is an error."""
    for name, expected in model.files.items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{model.name}: {file} is missing; reinstall whenwhere, or run {model.recipe}")
        if (found := digest(file)) != expected:
            raise RuntimeError(
                f"{model.name}: {file} is damaged or was changed: expected SHA-256 {expected}, found {found}. "
                f"Reinstall whenwhere, or run {model.recipe} and update the catalogue."
            )


def digest(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder, by its path there, sorted."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): digest(file) for file in files}
