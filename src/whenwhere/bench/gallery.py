"""The kept pictures of a bench: for a few prompts what every variant drew, and how it differs from plain."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, UnidentifiedImageError
from torch import Tensor

from .evidence import Evidence, Finding
from .rowfile import folder_of

AMPLIFIED = 4  # times, of differences
_LARGEST = 192  # pixels of a picture's edge in a report


@dataclass(frozen=True)
class Exhibit:
    """One prompt and seed: pictures and amplified differences of the variants, in the order of the findings."""

    prompt: str
    seed: int
    pictures: list[tuple[Finding, Image.Image, Image.Image]]


def exhibits(evidence: Evidence, most: int) -> list[Exhibit]:
    """Up to so many pairs of prompt and seed of which every variant has a picture.

    Raises:
        ValueError: a picture cannot be read.
    """
    folder = folder_of(evidence.path)
    found: list[Exhibit] = []
    for prompt in evidence.prompts:
        for seed in evidence.seeds:
            files = _files(evidence, folder, prompt, seed)
            if len(found) < most and all(file.is_file() for file in files):
                pictures = [_open(file) for file in files]
                found.append(Exhibit(prompt, seed, _beside_plain(evidence.findings, pictures)))
    return found


def _files(evidence: Evidence, folder: Path, prompt: str, seed: int) -> list[Path]:
    jobs = [
        replace(evidence.setting, method=finding.listing.method, prompt=prompt, seed=seed)
        for finding in evidence.findings
    ]
    return [folder / f"{job.key}.png" for job in jobs]


def pictures_of(evidence: Evidence, finding: Finding) -> list[Path]:
    """Where the pictures of a variant lie, by prompt and seed, as far as they were kept."""
    folder, setting = folder_of(evidence.path), replace(evidence.setting, method=finding.listing.method)
    jobs = [replace(setting, prompt=prompt, seed=seed) for prompt in evidence.prompts for seed in evidence.seeds]
    return [folder / f"{job.key}.png" for job in jobs]


def read_picture(file: Path) -> Tensor:
    """A picture as uint8 (3, H, W).

    Raises:
        ValueError: it cannot be read.
    """
    return torch.from_numpy(np.array(_read(file))).permute(2, 0, 1)


def _open(file: Path) -> Image.Image:
    picture = _read(file)
    picture.thumbnail((_LARGEST, _LARGEST))
    return picture


def _read(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{file} is no readable picture ({error}). Delete it; prompts without all pictures are left out."
        ) from error


def _beside_plain(
    findings: Sequence[Finding], pictures: Sequence[Image.Image]
) -> list[tuple[Finding, Image.Image, Image.Image]]:
    """The plain run is the first of the findings."""
    plain = pictures[0]
    return [
        (finding, picture, ImageChops.difference(picture, plain).point(lambda level: min(255, AMPLIFIED * level)))
        for finding, picture in zip(findings, pictures, strict=True)
    ]
