"""Controlled scenes: drawn pictures of 32 x 32 pixels whose every factor is known, their captions, and their reading.

A scene has seven factors. It is drawn from distances to its outlines, so that edges are smooth, with a small jitter in
place and size. A picture is read in closed form: the nearest, in squares, of all 5,184 scenes drawn without jitter.
Two factors are biased where the caption does not state them, so that a negative prompt has something to remove.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

SIDE = 32  # pixels
# The values of every factor, as captions spell them.
FACTORS = MappingProxyType(
    {
        "size": ("large", "small"),
        "texture": ("plain", "striped"),
        "colour": ("red", "orange", "yellow", "green", "blue", "purple"),
        "shape": ("circle", "square", "triangle", "ring"),
        "accessory": ("without halo", "with halo"),
        "position": (
            *("at top left", "at top middle", "at top right"),
            *("at centre left", "at centre middle", "at centre right"),
            *("at bottom left", "at bottom middle", "at bottom right"),
        ),
        "background": ("on white", "on grey", "on black"),
    }
)
NAMES = tuple(FACTORS)
COUNTS = tuple(len(values) for values in FACTORS.values())
# How often values occur where the caption leaves the factor out; a factor that is not listed is uniform.
PRIORS = MappingProxyType({"colour": (0.7, 0.06, 0.06, 0.06, 0.06, 0.06), "accessory": (0.3, 0.7)})
INKS = ((220, 30, 30), (245, 140, 20), (240, 220, 40), (40, 160, 60), (40, 90, 220), (140, 50, 180))
HALO = (0, 190, 200)  # of no ink's hue
PAPERS = ((255, 255, 255), (128, 128, 128), (16, 16, 16))
RADII = (6.5, 4.0)  # pixels
COLUMNS = (9.0, 16.0, 23.0)  # pixels, of the nine positions, in both directions
PERIOD = 4.0  # pixels from stripe to stripe


@dataclass(frozen=True)
class SceneOdds:
    """How often a caption takes each form, as probabilities, and how far a scene is moved."""

    empty: float = 0.1  # no words at all
    single: float = 0.1  # one factor alone, as negative prompts are written
    unstated: float = 0.5  # of every factor but the shape, in all other captions
    shift: float = 0.5  # pixels, the most in each direction
    growth: float = 0.06  # the most, as a share of the size


class Scenes(NamedTuple):
    """Some scenes with their captions."""

    factors: Tensor  # (B, 7), numbers of values in the order of NAMES
    stated: Tensor  # (B, 7), bool
    pixels: Tensor  # (B, 3, 32, 32) in [-1, 1]

    @property
    def captions(self) -> list[str]:
        """What is stated of each."""
        return [caption(scene, told) for scene, told in zip(self.factors.tolist(), self.stated.tolist(), strict=True)]


def every_scene() -> Tensor:
    """All combinations of values, (5184, 7); the last factor changes fastest."""
    return torch.cartesian_prod(*(torch.arange(count) for count in COUNTS))


def caption(scene: list[int], stated: list[bool]) -> str:
    """The values that are stated, in the order of NAMES: `large striped red circle with halo at top left on grey`."""
    words = [values[number] for values, number in zip(FACTORS.values(), scene, strict=True)]
    return " ".join(word for word, told in zip(words, stated, strict=True) if told)


def draw_scenes(count: int, generator: torch.Generator, odds: SceneOdds | None = None) -> Scenes:
    """Random scenes, each a little moved and larger or smaller; see `choose_scenes`."""
    odds = odds or SceneOdds()
    factors, stated = choose_scenes(count, generator, odds)
    move = 2 * torch.rand(count, 3, generator=generator) - 1
    return Scenes(factors, stated, render(factors, move * torch.tensor([odds.shift, odds.shift, odds.growth])))


def choose_scenes(count: int, generator: torch.Generator, odds: SceneOdds) -> tuple[Tensor, Tensor]:
    """Random factors and which of them the caption states, both (count, 7).

    Stated factors are uniform, the others as PRIORS says.
    """
    stated = torch.rand(count, len(NAMES), generator=generator) >= odds.unstated
    stated[:, NAMES.index("shape")] = True
    form = torch.rand(count, 1, generator=generator)
    single = torch.randint(len(NAMES), (count, 1), generator=generator)
    stated = torch.where(form < odds.empty + odds.single, torch.arange(len(NAMES)) == single, stated)
    stated = stated & (form >= odds.empty)
    factors = torch.empty(count, len(NAMES), dtype=torch.long)
    for place, (name, values) in enumerate(FACTORS.items()):
        fair = torch.randint(len(values), (count,), generator=generator)
        prior = torch.tensor(PRIORS.get(name, (1.0,) * len(values)))
        biased = torch.multinomial(prior, count, replacement=True, generator=generator)
        factors[:, place] = torch.where(stated[:, place], fair, biased)
    return factors, stated


def render(factors: Tensor, jitter: Tensor | None = None) -> Tensor:
    """Pictures (B, 3, 32, 32) in [-1, 1] of scenes (B, 7); jitter (B, 3) is pixels right, pixels down, share larger."""
    size, texture, colour, shape, accessory, position, background = factors.T
    right, down, larger = (torch.zeros(len(factors), 3) if jitter is None else jitter).T
    radius = (torch.tensor(RADII)[size] * (1 + larger)).view(-1, 1, 1)
    centres = torch.tensor(COLUMNS)
    pixel = torch.arange(SIDE) + 0.5
    x = pixel - (centres[position % 3] + right).view(-1, 1, 1)  # (B, 1, 32)
    y = pixel.view(-1, 1) - (centres[position // 3] + down).view(-1, 1, 1)  # (B, 32, 1)
    distance = outlines(x, y, radius)[shape, torch.arange(len(factors))]  # (B, 32, 32)
    halo = ((x.square() + y.square()).sqrt() - radius - 2).abs() - 0.6

    bright = torch.where(texture.view(-1, 1, 1) == 1, 0.6 + 0.4 * torch.cos(2 * torch.pi * y / PERIOD), 1.0)
    ink = paint(INKS, colour) * bright.unsqueeze(1)  # (B, 3, 32, 1)
    picture = cover(paint(PAPERS, background), ink, distance)
    picture = cover(picture, torch.tensor(HALO).view(1, 3, 1, 1).float(), halo, accessory.view(-1, 1, 1, 1))
    return picture / 127.5 - 1


def outlines(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Distances in pixels to the four outlines, negative inside, (4, B, 32, 32)."""
    round_ = (x.square() + y.square()).sqrt() - radius
    square = torch.maximum(x.abs().expand_as(round_), y.abs().expand_as(round_)) - 0.86 * radius
    triangle = torch.maximum(x.abs() * 0.866 - y * 0.5 - radius / 2, y - radius * 0.6)
    ring = (round_ + 0.3 * radius).abs() - 0.3 * radius
    return torch.stack([round_, square, triangle, ring])


def paint(colours: tuple[tuple[int, int, int], ...], choice: Tensor) -> Tensor:
    """The chosen colours, (B, 3, 1, 1), 0 to 255."""
    return torch.tensor(colours, dtype=torch.float32)[choice][..., None, None]


def cover(under: Tensor, ink: Tensor, distance: Tensor, present: Tensor | int = 1) -> Tensor:
    """Ink over a picture where the distance (B, 32, 32) is negative, with edges one pixel wide."""
    share = (0.5 - distance).clamp(0, 1).unsqueeze(1) * present
    return under + share * (ink - under)


class Reading(NamedTuple):
    """What pictures show."""

    factors: Tensor  # (B, 7), numbers of values in the order of NAMES
    error: Tensor  # (B,), root of the mean squared difference to the nearest scene, of values in [-1, 1]


class Reader:
    """Reads pictures; holds all scenes, 64 MB."""

    def __init__(self) -> None:
        self.scenes = every_scene()
        self.pictures = render(self.scenes).flatten(1)  # (5184, 3072)
        self.squares = self.pictures.square().sum(dim=1)

    def __call__(self, pixels: Tensor) -> Reading:
        """The nearest scene of every picture, (B, 3, 32, 32) in [-1, 1]."""
        flat = pixels.float().flatten(1)
        apart = self.squares - 2 * flat @ self.pictures.T + flat.square().sum(dim=1, keepdim=True)  # (B, 5184)
        least, nearest = apart.min(dim=1)
        return Reading(self.scenes[nearest], (least.clamp(min=0) / flat.shape[1]).sqrt())
