"""The trace of a text drawn over it: under every token a stack of cells, one for each routed layer, the first on top.

Tokens stand on a ground that is the darker, the more layers processed them.
"""

import html
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

from ..lm.trace import COMPUTED, TokenTrace
from .ink import FAINT, TEXT, box, clip, sheet_of_paper, width_of, wrap, write

_RUN, _SKIPPED = "#1F4E79", "#E4E7EC"
_LIGHT, _DARK = (0xFF, 0xFF, 0xFF), (0xA9, 0xD3, 0xEE)
_MARGIN, _TITLE, _WORD, _SMALL = 18.0, 14.0, 12.0, 9.0  # points
_LINE, _GAP = 18.0, 12.0
_LABELS = 26.0  # width of the numbers of layers


@dataclass(frozen=True)
class _Cell:
    """A token's place: its number, left end and width within a line."""

    token: int
    x: float
    width: float


def draw_words(trace: TokenTrace, title: str = "", width: float = 720.0) -> Image.Image:
    """The text with its trace.

    Args:
        trace: what to draw.
        title: what to write above it; the method where nothing is given.
        width: of the picture, in points of two pixels.
    """
    lines = list(_lines(trace, width - 2 * _MARGIN - _LABELS))
    tall = 6.0 if len(trace.rows) <= 8 else 3.0
    height = _LINE + tall * len(trace.rows) + _GAP
    heading = wrap(title or trace.method, _TITLE, width - 2 * _MARGIN)
    head = _MARGIN + len(heading) * _LINE + _SMALL + 12
    image, pen = sheet_of_paper(width, head + height * len(lines) + 12 + _MARGIN)
    for number, part in enumerate(heading):
        write(pen, _MARGIN, _MARGIN + _TITLE / 2 + number * _LINE, part, _TITLE)
    write(pen, _MARGIN, head - _SMALL - 5, clip(_about(trace), _SMALL, width - 2 * _MARGIN), _SMALL, FAINT)
    for number, line in enumerate(lines):
        _draw_line(pen, trace, line, head + number * height, tall)
    _draw_legend(pen, head + height * len(lines) + 4)
    return image


def write_words(trace: TokenTrace, title: str = "") -> str:
    """The same as a page of HTML that needs nothing else; a token says its layers when it is pointed at."""
    layers = list(trace.rows)
    words = []
    for number, (token, depth) in enumerate(zip(trace.tokens, trace.depths, strict=True)):
        run = [layer for layer in layers if trace.rows[layer][number] == COMPUTED]
        said = f"token {number}, layers: {', '.join(map(str, run)) or 'none'}"
        marks = "".join(f"<i class={'r' if layer in run else 's'}></i>" for layer in layers)
        shown = html.escape(token).replace("\n", "⏎")
        words.append(f'<b style="--d:{depth:.3f}" title="{said}"><u>{shown}</u>{marks}</b>' + "<br>" * ("\n" in token))
    name = html.escape(title or trace.method)
    return _PAGE.format(title=name, about=html.escape(_about(trace)), words="".join(words))


def _about(trace: TokenTrace) -> str:
    mean = sum(trace.depths) / len(trace.depths)
    routed = ", ".join(map(str, trace.rows))
    return f"{trace.method}: {mean:.1%} of {len(trace.tokens)} tokens in the routed layers ({routed}) of {trace.layers}"


def _lines(trace: TokenTrace, room: float) -> Iterator[list[_Cell]]:
    """Tokens in lines that fit, and that end where the text's do."""
    line: list[_Cell] = []
    x = 0.0
    for number, token in enumerate(trace.tokens):
        width = max(4.0, width_of(_plain(token), _WORD))
        if line and x + width > room:
            yield line
            line, x = [], 0.0
        line.append(_Cell(number, x, width))
        x += width
        if "\n" in token:
            yield line
            line, x = [], 0.0
    if line:
        yield line


def _plain(token: str) -> str:
    return token.replace("\r", "").replace("\n", "").replace("\t", " ")


def _draw_line(pen: ImageDraw.ImageDraw, trace: TokenTrace, line: list[_Cell], top: float, tall: float) -> None:
    left = _MARGIN + _LABELS
    for cell in line:
        box(pen, left + cell.x, top, cell.width, _LINE - 3, _shade(trace.depths[cell.token]))
        write(pen, left + cell.x, top + (_LINE - 3) / 2, _plain(trace.tokens[cell.token]), _WORD, TEXT)
    layers = list(trace.rows)
    for number, layer in enumerate(layers):
        y = top + _LINE + number * tall
        for cell in line:
            ran = trace.rows[layer][cell.token] == COMPUTED
            box(pen, left + cell.x, y, cell.width - 1, tall - 0.5, _RUN if ran else _SKIPPED)
    for layer, y in {layers[0]: top + _LINE + 4, layers[-1]: top + _LINE + len(layers) * tall - 4}.items():
        if len(layers) == 1 or len(layers) * tall >= 18 or layer == layers[0]:
            write(pen, left - 6, y, str(layer), _SMALL, FAINT, anchor="rm")


def _draw_legend(pen: ImageDraw.ImageDraw, y: float) -> None:
    x = _MARGIN + _LABELS
    for name, colour in (("computed", _RUN), ("skipped", _SKIPPED)):
        box(pen, x, y - 1, 10, 10, colour)
        write(pen, x + 15, y + 4, name, _SMALL, TEXT)
        x += 15 + width_of(name, _SMALL) + 18


def _shade(share: float) -> str:
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(_LIGHT, _DARK, strict=True))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.2 system-ui, sans-serif; margin: 2em auto; max-width: 60em; color: #1b1f24; background: #fff }}
b {{ display: inline-block; font-weight: normal; vertical-align: top; margin-bottom: 10px }}
u {{ display: block; text-decoration: none; white-space: pre; min-width: 4px; height: 1.3em;
  background: rgb(31 78 121 / calc(var(--d) * 35%)) }}
i {{ display: block; height: 3px; margin: 0 1px 1px 0 }}
.r {{ background: #1f4e79 }} .s {{ background: #e4e7ec }}
</style></head><body><h1>{title}</h1><p>{about}. Under every token: its routed layers, the first on top;
dark is computed.</p>
<p>{words}</p></body></html>
"""
