"""Sets of pictures: how far what a variant drew lies from real pictures, all together, by a network that a user has.

Distances are named after the network and compare with no others. They judge sets, so they are no part of a row: they
are computed from the pictures that a bench kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..metrics.features import PictureFeatures, frechet_distance, kernel_distance
from .evidence import Evidence, Finding
from .gallery import pictures_of, read_picture

_LEAST = 10  # pictures of a set
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

Extractor = Callable[[Tensor], Tensor]  # uint8 pictures (B, 3, H, W) -> features (B, F)


@dataclass(frozen=True)
class SetDistance:
    """One variant against the real pictures.

    Attributes:
        pictures: of the variant.
        kid, spread: kernel distance, mean and standard deviation over random subsets; 0 for one distribution.
        frechet: Fréchet distance; `None` with fewer pictures than features, where it means nothing.
    """

    pictures: int
    kid: float
    spread: float
    frechet: float | None


@dataclass(frozen=True)
class Distances:
    """All variants against the same real pictures, by the expressions of the variants."""

    network: str
    real: int
    by_method: dict[str, SetDistance]


def extractor(clip: str) -> tuple[str, Extractor]:
    """A network with its name: CLIP from a folder, or EfficientNet-Lite0 where none is given.

    Raises:
        ImportError: a package is missing; the message says what to install.
        ValueError: the folder holds no CLIP model.
    """
    if not clip:
        return "EfficientNet-Lite0", PictureFeatures()
    from ..metrics.clip import ClipScore

    return f"CLIP {Path(clip).name}", ClipScore(clip).features


def measure_sets(evidence: Evidence, real: Path, clip: str = "") -> Distances:
    """Every variant's kept pictures against a folder of real ones.

    Raises:
        ValueError: there are too few pictures, or one cannot be read.
    """
    files = sorted(file for file in real.rglob("*") if file.suffix.lower() in _ENDINGS) if real.is_dir() else []
    if len(files) < _LEAST:
        raise ValueError(f"{real} holds {len(files)} pictures ({', '.join(_ENDINGS)}); a set needs {_LEAST}.")
    name, network = extractor(clip)
    theirs = _features(network, files)
    found = {finding.listing.method: _distance(evidence, finding, network, theirs) for finding in evidence.findings}
    return Distances(name, len(files), found)


def _distance(evidence: Evidence, finding: Finding, network: Extractor, theirs: Tensor) -> SetDistance:
    kept = [file for file in pictures_of(evidence, finding) if file.is_file()]
    if len(kept) < _LEAST:
        raise ValueError(
            f"{finding.listing.label} has {len(kept)} kept pictures; a set needs {_LEAST}. Run `whenwhere bench` with "
            "--pictures as high as there are prompts times seeds."
        )
    ours = _features(network, kept)
    size = min(len(ours), len(theirs)) // 2
    mean, spread = kernel_distance(theirs, ours, subset_size=size, generator=torch.Generator().manual_seed(0))
    enough = min(len(ours), len(theirs)) > ours.shape[1]
    return SetDistance(len(kept), mean, spread, frechet_distance(theirs, ours) if enough else None)


@torch.no_grad()
def _features(network: Extractor, files: list[Path]) -> Tensor:
    """One by one, since real pictures may have any size: (B, F)."""
    return torch.cat([network(read_picture(file)[None]) for file in files])
