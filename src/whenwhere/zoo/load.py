"""Load the models that come with the library; every file is checked against the catalogue first."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging

from whenwhere.models.patch_pca import PatchPCA
from whenwhere.zoo.catalog import CATALOG, Entry


def names() -> list[str]:
    """The models of the zoo, sorted."""
    return sorted(CATALOG)


def entry(name: str) -> Entry:
    """What the catalogue says about a model; an unknown name raises ValueError with the nearest known one."""
    if name in CATALOG:
        return CATALOG[name]
    near = get_close_matches(name, CATALOG, n=1, cutoff=0.0)
    raise ValueError(f"the zoo has no model {name!r}; did you mean {near[0]!r}? It has: {', '.join(names())}")


def path(name: str) -> Path:
    """The folder of a model, which `StableDiffusionPipeline.from_pretrained` reads too."""
    return Path(__file__).parent / entry(name).folder


def load(name: str) -> StableDiffusionPipeline:
    """The pipeline of this name in float32, on the CPU, with its progress bar off.

    Raises ValueError for an unknown name, FileNotFoundError for a missing file and RuntimeError for a changed one.
    """
    folder = path(name)
    check(entry(name), folder)
    with silence():
        pipeline = StableDiffusionPipeline(
            vae=PatchPCA.from_pretrained(folder / "vae", dtype=torch.float32),
            text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            unet=UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float32),
            scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
