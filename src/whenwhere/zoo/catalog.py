"""What the zoo holds, as data: where each model lies, what it was trained by, and how good it is."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

# SHA-256 by model, then by path in its folder; `recipes/admit.py` writes it.
_DIGESTS: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("digests.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Entry:
    """One model of the zoo."""

    name: str
    pipeline: str  # its class in diffusers
    folder: str  # beside this file
    files: Mapping[str, str]  # path in the folder -> SHA-256 of its content
    recipe: str  # the program that trained it, in the repository
    licence: str
    steps: int  # sensible number of denoising steps
    guidance: float  # sensible guidance scale
    scores: Mapping[str, float]  # measured, see docs/results


def _emoji(name: str, pipeline: str, recipe: str, steps: int, guidance: float, scores: dict[str, float]) -> Entry:
    """A model of the drawings in data/emoji."""
    return Entry(
        name=name,
        pipeline=pipeline,
        folder=name,
        files=MappingProxyType(_DIGESTS[name]),
        recipe=recipe,
        licence="Apache-2.0; the drawings it learned from are named in NOTICE",
        steps=steps,
        guidance=guidance,
        scores=MappingProxyType(scores),
    )


EMOJI_UNET = _emoji(
    "emoji-unet",
    "StableDiffusionPipeline",
    "recipes/emoji_unet.py",
    steps=20,
    guidance=3.0,
    scores={
        "alignment, training prompts": 0.415,
        "alignment, recombined prompts": 0.351,
        "KID (EfficientNet-Lite0)": 0.3707,
    },
)

EMOJI_PIXART = _emoji(
    "emoji-pixart",
    "PixArtAlphaPipeline",
    "recipes/emoji_pixart.py",
    steps=20,
    guidance=3.0,
    scores={
        "alignment, training prompts": 0.467,
        "alignment, recombined prompts": 0.336,
        "KID (EfficientNet-Lite0)": 0.1832,
    },
)

EMOJI_UNET_LCM = _emoji(
    "emoji-unet-lcm",
    "StableDiffusionPipeline",
    "recipes/emoji_student.py",
    steps=4,
    guidance=1.0,
    scores={
        "alignment, training prompts": 0.412,
        "alignment, recombined prompts": 0.335,
        "KID (EfficientNet-Lite0)": 0.4596,
    },
)

EMOJI_PIXART_LCM = _emoji(
    "emoji-pixart-lcm",
    "PixArtAlphaPipeline",
    "recipes/emoji_student.py",
    steps=4,
    guidance=1.0,
    scores={
        "alignment, training prompts": 0.426,
        "alignment, recombined prompts": 0.321,
        "KID (EfficientNet-Lite0)": 0.3264,
    },
)

# Of one size and training: a DiT, the same with long skips, and a wider one that costs what the skips cost.
_CLASSES = tuple(
    _emoji(
        name,
        "DiTPipeline",
        "recipes/skip_dit.py",
        steps=20,
        guidance=3.0,
        scores={"alignment, training prompts": alignment, "KID (EfficientNet-Lite0)": distance},
    )
    for name, alignment, distance in (
        ("emoji-dit", 0.201, 0.9831),
        ("emoji-skip-dit", 0.22, 0.9082),
        ("emoji-wide-dit", 0.222, 0.936),
    )
)

CATALOG: Mapping[str, Entry] = MappingProxyType(
    {entry.name: entry for entry in (*_CLASSES, EMOJI_UNET, EMOJI_UNET_LCM, EMOJI_PIXART, EMOJI_PIXART_LCM)}
)
