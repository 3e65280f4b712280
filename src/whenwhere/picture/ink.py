"""Paper, fonts and colours: what everything drawn has in common. All lengths are in points; `SCALE` pixels make one."""

import re
from functools import cache
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

SCALE = 2  # sharp on dense screens, and in print

PAPER = "#FFFFFF"
TEXT = "#1B1F24"
FAINT = "#6B7280"
RULE = "#D5D9E0"

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


def pixels(points: float) -> int:
    """Points as whole pixels."""
    return round(points * SCALE)


def sheet_of_paper(width: float, height: float) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty picture of so many points, and a pen for it."""
    image = Image.new("RGB", (pixels(width), pixels(height)), PAPER)
    return image, ImageDraw.Draw(image)


@cache
def font(size: float) -> Font:
    """Pillow's own typeface, so that a picture looks the same on every machine."""
    return ImageFont.load_default(pixels(size))


def width_of(text: str, size: float) -> float:
    """How wide a line of text is, in points."""
    return font(size).getlength(text) / SCALE


def write(
    pen: ImageDraw.ImageDraw, x: float, y: float, text: str, size: float, colour: str = TEXT, anchor: str = "lm"
) -> None:
    """Write a line of text; `anchor` is Pillow's ("lm": x is its left end, y its middle)."""
    pen.text((pixels(x), pixels(y)), text, fill=colour, font=font(size), anchor=anchor)


def box(pen: ImageDraw.ImageDraw, x: float, y: float, width: float, height: float, colour: str) -> None:
    """Fill a rectangle; neighbours in a grid neither overlap nor leave a gap."""
    left, top, right, bottom = pixels(x), pixels(y), pixels(x + width) - 1, pixels(y + height) - 1
    pen.rectangle((left, top, max(left, right), max(top, bottom)), fill=colour)


def wrap(text: str, size: float, width: float) -> list[str]:
    """The text in lines that fit, broken at blanks and inside expressions; what is still too long is cut."""
    lines: list[str] = []
    for piece in re.findall(r"[^\s(+,]*[(+,]?\s*", text):
        longer = lines[-1] + piece if lines else piece
        if lines and width_of(longer.rstrip(), size) <= width:
            lines[-1] = longer
        elif piece:
            lines.append(piece)
    return [clip(line.rstrip(), size, width) for line in lines]


def clip(text: str, size: float, width: float) -> str:
    """The text, cut with an ellipsis if it is too wide."""
    if width_of(text, size) <= width:
        return text
    while text and width_of(text + "…", size) > width:
        text = text[:-1]
    return text + "…"
