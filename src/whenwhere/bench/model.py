"""Models to run: a name of the zoo, or a directory that `save_pretrained` wrote."""

import hashlib
import importlib
import inspect
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..spelling import did_you_mean

_DEFAULT_STEPS = 25
_CONTENT = (".json", ".safetensors", ".bin", ".txt", ".model")  # files that say what a pipeline computes


@dataclass(frozen=True)
class Model:
    """A pipeline, ready to run.

    Attributes:
        name: as the user gave it.
        pipeline: the diffusers pipeline.
        revision: a hash of its files.
        steps, guidance: sensible values where the user gives none.
    """

    name: str
    pipeline: Any
    revision: str
    steps: int
    guidance: float

    @property
    def dtype(self) -> str:
        """The type of the denoiser's numbers, for example "float32"."""
        return str(self.pipeline.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs."""
        return torch.device(self.pipeline.device)


def open_model(name: str, device: str = "auto", dtype: str = "auto") -> Model:
    """Load a pipeline from the zoo or a directory.

    Args:
        name: a name of the zoo, or a directory.
        device: "cpu", "cuda", ...; "auto" for an accelerator where there is one.
        dtype: "float32", "float16" or "bfloat16"; "auto" for float16 on an accelerator, float32 on the CPU.

    Raises:
        ValueError: neither a name of the zoo nor a directory, or the directory cannot be loaded.
    """
    from .. import zoo

    device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype if dtype != "auto" else "float32" if device == "cpu" else "float16"
    numbers = getattr(torch, dtype, None)
    if not isinstance(numbers, torch.dtype):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}.")
    if name in zoo.names():
        entry, folder = zoo.entry(name), zoo.path(name)
        pipeline, steps, guidance = zoo.load(name), entry.steps, entry.guidance
    else:
        folder = find_directory(name, zoo.names())
        pipeline = _read(folder, numbers)
        steps, guidance = _DEFAULT_STEPS, _usual_guidance(pipeline)
    if pipeline.dtype != numbers:
        pipeline.to(numbers)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return Model(name, pipeline, digest(folder), steps, guidance)


def find_directory(name: str, known: list[str]) -> Path:
    """The directory of a saved pipeline.

    Raises:
        ValueError: it does not exist, or holds no pipeline.
    """
    folder = Path(name)
    if not folder.is_dir():
        looks_like_path = os.sep in name or folder.exists()
        hint = "." if looks_like_path else f"{did_you_mean(name, known)} Known: {', '.join(known)}."
        raise ValueError(f"no model {name!r}: neither a known name nor a directory{hint}")
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} holds no pipeline: there is no model_index.json. pipe.save_pretrained() writes it.")
    return folder


def _read(folder: Path, dtype: torch.dtype) -> Any:
    """Load a directory; whatever goes wrong in there is an error of the directory."""
    from diffusers import DiffusionPipeline

    try:
        _import_our_own(folder)
        return DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except Exception as error:  # the libraries below raise anything from OSError to SafetensorError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{folder} cannot be loaded: {reason}") from error


def _import_our_own(folder: Path) -> None:
    """Import the networks of this library that the pipeline names; diffusers loads only from what is imported."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for part in index.values():
        library = part[0] if isinstance(part, list) and part else None
        if isinstance(library, str) and library.startswith("whenwhere.models."):
            importlib.import_module(library)


def _usual_guidance(pipeline: Any) -> float:
    """The guidance scale that the pipeline takes where none is given."""
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("guidance_scale")
    return float(parameter.default) if parameter is not None else 1.0


def digest(folder: Path) -> str:
    """The first 16 hexadecimal digits of a SHA-256 over the names and contents of a pipeline's files."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.suffix in _CONTENT):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()[:16]
