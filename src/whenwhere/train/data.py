"""Captioned pictures for small text-to-image models: a sheet of tiles, an index, and captions drawn afresh each time.

A caption names the subject by its label or by some of its tags, mostly followed by the drawing style. Some pictures are
repainted in another colour and say so, so that a colour word means something on its own. The empty caption is the null
of classifier-free guidance.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from whenwhere.train.colours import COLOURS, main_colour, repaint


@dataclass(frozen=True)
class Picture:
    """One drawing of one concept: what it shows, in which style, and where its tile lies on the sheet."""

    label: str
    tags: tuple[str, ...]
    group: str
    style: str
    tile: int
    colour: str = ""  # the colour word of most of the drawing; empty when there is none
    repainted: bool = False  # whether that colour is ours and not the artist's


@dataclass(frozen=True)
class CaptionOdds:
    """How often a caption takes each form, as probabilities."""

    empty: float = 0.1  # no words at all
    style: float = 0.8  # ends with ", STYLE style"
    tags: float = 0.12  # one to three tags instead of the label
    and_tags: float = 0.1  # the label and then one or two tags
    colour: float = 0.1  # the natural colour in front of the name
    repainted: float = 0.15  # share of draws that take a repainted picture


class Split(NamedTuple):
    """Pictures to train on, and pictures of known concepts in known styles whose pairing was never shown."""

    training: list[Picture]
    recombined: list[Picture]


def read_pictures(folder: Path, labels: Iterable[str] | None = None) -> list[Picture]:
    """The pictures of `folder/index.json`, of these labels or of all; unknown labels raise ValueError."""
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    wanted = None if labels is None else set(labels)
    if wanted and (unknown := wanted - {row["label"] for row in index["concepts"]}):
        raise ValueError(f"{folder / 'index.json'} has no concept {', '.join(sorted(unknown))}")
    return [
        Picture(row["label"], tuple(row["tags"]), row["group"], style, tile)
        for row in index["concepts"]
        if wanted is None or row["label"] in wanted
        for style, tile in row["tiles"].items()
    ]


def read_tiles(folder: Path, pictures: Sequence[Picture]) -> Tensor:
    """The pixels of these pictures, uint8 (B, 3, 32, 32), from `folder/sheet.webp`."""
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    tile, columns = index["tile"], index["columns"]
    with Image.open(folder / "sheet.webp") as image:
        sheet = np.array(image.convert("RGB"))
    corners = [divmod(picture.tile, columns) for picture in pictures]
    cuts = [sheet[row * tile : (row + 1) * tile, col * tile : (col + 1) * tile] for row, col in corners]
    return torch.from_numpy(np.stack(cuts)).permute(0, 3, 1, 2).contiguous()


def to_unit(pixels: Tensor) -> Tensor:
    """Bytes 0..255 as floats in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def withhold(pictures: Sequence[Picture], concepts: int, seed: int = 0) -> Split:
    """Take one style away from this many concepts, evenly over the styles; single-style concepts are left whole."""
    by_label: dict[str, list[Picture]] = {}
    for picture in pictures:
        by_label.setdefault(picture.label, []).append(picture)
    several = [label for label, drawings in by_label.items() if len(drawings) > 1]
    if concepts > len(several):
        raise ValueError(f"{concepts} concepts cannot lose a style: only {len(several)} have more than one")
    chosen = torch.randperm(len(several), generator=torch.Generator().manual_seed(seed))[:concepts].tolist()
    away = {by_label[several[pick]][turn % len(by_label[several[pick]])] for turn, pick in enumerate(chosen)}
    return Split([p for p in pictures if p not in away], [p for p in pictures if p in away])


def with_colours(pictures: Sequence[Picture], pixels: Tensor) -> tuple[list[Picture], Tensor]:
    """The pictures with their main colour named, followed by repainted copies of those that have one."""
    named: list[Picture] = []
    painted: list[Picture] = []
    paintings: list[Tensor] = []
    for picture, image in zip(pictures, pixels, strict=True):
        colour = main_colour(image)
        named.append(Picture(picture.label, picture.tags, picture.group, picture.style, picture.tile, colour))
        if not colour or not bare_name(picture):
            continue
        for other in sorted(set(COLOURS) - {colour}):
            painted.append(
                Picture(picture.label, picture.tags, picture.group, picture.style, picture.tile, other, repainted=True)
            )
            paintings.append(repaint(image, other))
    return named + painted, torch.cat([pixels, torch.stack(paintings)]) if paintings else pixels


def bare_name(picture: Picture) -> str:
    """The label without colour words: `red apple` -> `apple`, `dog face` -> `dog`; may be empty."""
    words = [word for word in picture.label.split() if word not in COLOURS]
    if picture.group == "animals-nature" and len(words) > 1 and words[-1] == "face":
        words = words[:-1]
    return " ".join(words)


def caption(picture: Picture, odds: CaptionOdds, generator: torch.Generator) -> str:
    """One caption of the picture, different from call to call."""
    empty, style, form, short = torch.rand(4, generator=generator).tolist()
    if empty < odds.empty:
        return ""
    parts = [f"{picture.colour} {bare_name(picture)}"] if picture.repainted else subject(picture, odds, form, generator)
    if short < 0.5 and parts[0] == picture.label and picture.group == "animals-nature":
        parts[0] = picture.label.removesuffix(" face")
    return ", ".join([*parts, f"{picture.style} style"] if style < odds.style else parts)


def subject(picture: Picture, odds: CaptionOdds, form: float, generator: torch.Generator) -> list[str]:
    """What the picture shows, in one to three phrases; `form` in [0, 1] selects the wording."""
    if form < odds.tags and picture.tags:
        return some(picture.tags, 3, generator)
    if form < odds.tags + odds.and_tags and picture.tags:
        return [picture.label, *some(picture.tags, 2, generator)]
    if form < odds.tags + odds.and_tags + odds.colour and picture.colour and bare_name(picture):
        return [f"{picture.colour} {bare_name(picture)}"]
    return [picture.label]


def some(phrases: Sequence[str], most: int, generator: torch.Generator) -> list[str]:
    """One to `most` of the phrases in random order."""
    count = int(torch.randint(1, most + 1, (), generator=generator))
    return [phrases[i] for i in torch.randperm(len(phrases), generator=generator)[:count].tolist()]
