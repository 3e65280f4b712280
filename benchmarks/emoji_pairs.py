"""Prompts and negative texts that compete, for the models of emoji, and what is read from the pictures.

Three kinds: `heart, noto style` against `red heart, noto style`, where red is what the drawings show; the same against
the bare word `red`; and `heart` against one of the six styles. The unwanted colour is seen if it is the main one of the
picture (`train/colours.py` reads it), the unwanted style if the picture is nearest to it among the six, and the right
concept if it is nearest among all; nearness and scores are those of the alignment heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from whenwhere.bench.intervals import Case
from whenwhere.metrics.alignment import Alignment, cosines
from whenwhere.train.colours import main_colour
from whenwhere.train.data import Picture, bare_name, read_pictures, read_tiles, with_colours

DATA = Path("data/emoji")
STYLES = ("noto", "blob", "twemoji", "flat", "shaded", "emojione")


@dataclass(frozen=True)
class Pair:
    """A prompt and a negative text that competes with it."""

    kind: str  # "colour", "word" or "style"
    prompt: str
    negative: str
    unwanted: str  # what the negative text would look like here, in full
    concept: str  # without colour words
    value: str  # the colour or the style that the negative text names

    @property
    def label(self) -> str:
        """How a table calls it."""
        return f"{self.prompt} - {self.negative}"


def pairs(count: int) -> list[Pair]:
    """So many pairs of each kind, the same every time; concepts differ within a kind as long as there are enough."""
    given = read_pictures(DATA, labels())
    named = [picture for picture in with_colours(given, read_tiles(DATA, given))[0] if not picture.repainted]
    order = torch.randperm(len(named), generator=torch.Generator().manual_seed(0)).tolist()
    coloured = distinct([named[number] for number in order if named[number].colour and bare_name(named[number])])
    plain = distinct([named[number] for number in order])
    found = []
    for picture in (coloured * 2)[:count]:
        style, bare = f"{picture.style} style", bare_name(picture)
        unwanted = f"{picture.colour} {bare}, {style}"
        found.append(Pair("colour", f"{bare}, {style}", unwanted, unwanted, bare, picture.colour))
    for picture in (coloured[count:] + coloured)[:count]:
        style, bare = f"{picture.style} style", bare_name(picture)
        unwanted = f"{picture.colour} {bare}, {style}"
        found.append(Pair("word", f"{bare}, {style}", picture.colour, unwanted, bare, picture.colour))
    for number, picture in enumerate((plain * 2)[:count]):
        value = STYLES[number % len(STYLES)]
        unwanted = f"{picture.label}, {value} style"
        found.append(Pair("style", picture.label, f"{value} style", unwanted, bare_name(picture), value))
    return found


def labels() -> list[str]:
    """The concepts that the models know."""
    return (DATA / "clear.txt").read_text(encoding="utf-8").split("\n")[:-1]


def distinct(pictures: list[Picture]) -> list[Picture]:
    """The first picture of each concept."""
    return list({picture.label: picture for picture in reversed(pictures)}.values())[::-1]


class Judge:
    """Reads pictures: cosines with texts, and whether the unwanted colour or style and the right concept are seen."""

    def __init__(self) -> None:
        self.score = Alignment()
        self.known: dict[str, Tensor] = {}
        self.concepts = sorted({bare_name(picture) for picture in read_pictures(DATA, labels())})

    @torch.no_grad()
    def __call__(self, chosen: list[Pair], pictures: Tensor) -> dict[str, dict[Case, float]]:
        """One column of numbers for each thing that is read, by pair and seed, of pictures (P, S, 3, H, W)."""
        columns: dict[str, dict[Case, float]] = {}
        for pair, drawn in zip(chosen, pictures, strict=True):
            pixels = (drawn * 255).round().byte()
            seen = self.score.heads(self.score.picture_features(pixels), torch.zeros(len(pixels), 384))[0]
            wanted, unwanted = (cosines(seen, self.texts([text])) for text in (pair.prompt, pair.unwanted))
            kept = self.nearest(seen, pair, self.concepts, "{}", pair.concept)
            if pair.kind == "style":
                there = self.nearest(seen, pair, STYLES, f"{pair.prompt}, {{}} style", pair.value)
            else:
                there = torch.tensor([main_colour(picture) == pair.value for picture in pixels])
            read = {
                "prompt": wanted,
                "negative": unwanted,
                "margin": wanted - unwanted,
                "gone": ~there,
                "kept": kept,
                "both": kept & ~there,
            }
            for name, values in read.items():
                column = columns.setdefault(name, {})
                column |= {(pair.label, seed): float(value) for seed, value in enumerate(values)}
        return columns

    def texts(self, texts: list[str]) -> Tensor:
        """Vectors (T, 256), each made once."""
        if new := [text for text in texts if text not in self.known]:
            found = self.score.heads(torch.zeros(len(new), 1280), self.score.sentence_features(new))[1]
            self.known |= dict(zip(new, found, strict=True))
        return torch.stack([self.known[text] for text in texts])

    def nearest(self, seen: Tensor, pair: Pair, choices: Sequence[str], form: str, right: str) -> Tensor:
        """Whether pictures (S, D) are nearer to the right choice than to every other, (S,)."""
        ending = f", {pair.prompt.partition(', ')[2]}" if ", " in pair.prompt else ""
        found = seen @ self.texts([form.format(choice) + ending for choice in choices]).T
        return found.argmax(dim=1) == list(choices).index(right)
