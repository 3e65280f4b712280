"""Colour words and pixels: name the main colour of a drawing, and repaint it in another one.

Only hues near the main one move, so a blue apple keeps its green leaf. White, grey and black never change.
"""

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

COLOURS = {"red": 0, "orange": 30, "yellow": 52, "green": 120, "blue": 215, "purple": 280, "pink": 330}  # hue, degrees
NEAR = 50  # degrees: how far from the main hue a pixel still belongs to the main colour
SATURATED = 60  # of 255: below it a pixel counts as grey
ENOUGH = 0.3  # of the drawn pixels must have the main colour, else the drawing has none

Hsv = npt.NDArray[np.float64]  # (H, W, 3): degrees, and 0..255 twice


def main_colour(image: Tensor) -> str:
    """The colour word for most of a drawing on white, uint8 (3, H, W); empty when no colour prevails."""
    hsv = to_hsv(image)
    if (hue := main_hue(hsv)) is None:
        return ""
    return min(COLOURS, key=lambda word: abs(turn(hue, COLOURS[word])))


def repaint(image: Tensor, colour: str) -> Tensor:
    """The drawing with its main colour replaced by another, same shape and type; unchanged when it has none."""
    hsv = to_hsv(image)
    if (hue := main_hue(hsv)) is None:
        return image
    near = np.abs(turn(hsv[..., 0], hue)) <= NEAR
    hsv[..., 0] = np.where(near, (hsv[..., 0] + turn(COLOURS[colour], hue)) % 360, hsv[..., 0])
    packed = (hsv * [256 / 360, 1, 1]).astype(np.uint8)
    rgb = np.array(Image.fromarray(packed, mode="HSV").convert("RGB"))
    return torch.from_numpy(rgb).permute(2, 0, 1)


def to_hsv(image: Tensor) -> Hsv:
    """Hue in degrees, saturation and value in 0..255, of a uint8 picture (3, H, W)."""
    packed = np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("HSV"), dtype=np.float64)
    return packed * [360 / 256, 1, 1]


def main_hue(hsv: Hsv) -> float | None:
    """The hue around which most of the colour lies; None when less than `ENOUGH` of the drawing is near it."""
    drawn = (hsv[..., 1] > 20) | (hsv[..., 2] < 235)
    colourful = (hsv[..., 1] > SATURATED) & (hsv[..., 2] > 50)
    hues, weights = hsv[..., 0][colourful], (hsv[..., 1] * hsv[..., 2])[colourful]
    if not len(hues):
        return None
    centres = [10.0 * step for step in range(36)]
    crowd = [(weights * (np.abs(turn(hues, centre)) <= 20)).sum() for centre in centres]
    centre = centres[int(np.argmax(crowd))]
    close = np.abs(turn(hues, centre)) <= 20
    if close.sum() < ENOUGH * drawn.sum():
        return None
    return float((centre + np.average(turn(hues[close], centre), weights=weights[close])) % 360)


def turn(hue: npt.NDArray[np.float64] | float, origin: float) -> npt.NDArray[np.float64]:
    """The signed way from one hue to another round the circle, in [-180, 180)."""
    return (np.asarray(hue, dtype=np.float64) - origin + 180) % 360 - 180
