"""A plan as a picture: a row for every site, a column for every step, a colour for every decision.

Rows stand in sections, one per kind of site, in the order of execution. The palette is that of Okabe and Ito
(https://jfly.uni-koeln.de/color/), ordered by lightness, so that decisions differ for every eye and in black and white.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from PIL import Image, ImageDraw

from ..plan import Plan
from ..site import Kind, Site
from .ink import FAINT, PAPER, RULE, TEXT, box, clip, pixels, sheet_of_paper, width_of, wrap, write

_COLOURS = {"computed": "#1F4E79", "reused": "#A9D3EE", "one guidance branch": "#E69F00"}
_SPARE = ("#009E73", "#CC79A7", "#D55E00", "#F0E442", "#56B4E9")  # for further decisions, in the order of the legend
_NOT_REACHED, _NOWHERE = "not reached", "#EEF0F3"

_MARGIN = 18.0
_TITLE, _LABEL, _SMALL = 14.0, 11.0, 9.0  # sizes of text
_LINE = 1.35  # line height over size of text
_GAP = 10.0  # between sections


@dataclass(frozen=True)
class _Section:
    """The sites of one kind, with their rows of characters."""

    kind: Kind
    sites: list[Site]
    rows: list[str]

    @property
    def row_height(self) -> float:
        return 18.0 if len(self.rows) == 1 else min(14.0, max(1.5, 110.0 / len(self.rows)))

    @property
    def height(self) -> float:
        return max(18.0, self.row_height * len(self.rows))

    def sides(self) -> Iterator[tuple[str, float, float]]:
        """Runs of sites on one side of the skip ladder: name, top and height within the section."""
        top = 0.0
        for side, run in groupby(self.sites, key=lambda site: site.side):
            height = self.row_height * len(list(run))
            if side is not None and len(self.sites) > 1:
                yield side.value, top, height
            top += height


def draw_plan(plan: Plan, title: str | None = None, width: float = 720.0) -> Image.Image:
    """The table of a plan or trace, with a legend, an axis of steps and its cost in words.

    Args:
        plan: what to draw.
        title: what to write above it; the methods where nothing is given.
        width: of the picture, in points of two pixels.
    """
    sections = [
        _Section(kind, *map(list, zip(*pairs, strict=True)))
        for kind in dict.fromkeys(site.kind for site in plan.sites)
        if (pairs := [pair for pair in zip(plan.sites, plan.rows, strict=True) if pair[0].kind is kind])
    ]
    colours = _colours(plan)
    heading = wrap(title or " + ".join(plan.methods) or "plain", _TITLE, width - 2 * _MARGIN)
    left = _MARGIN + 8 + max(width_of(section.kind.value, _LABEL) for section in sections)
    if any(list(section.sides()) for section in sections):
        left += width_of("encoder", _SMALL) + 14
    table = sum(section.height + _GAP for section in sections)
    head = _MARGIN + len(heading) * _TITLE * _LINE + _SMALL * _LINE + 10
    foot = 26 + _LABEL * _LINE + 8 + len(_cost(plan, width)) * _SMALL * _LINE + _MARGIN
    image, pen = sheet_of_paper(width, head + table + foot)
    _draw_heading(pen, heading, plan, width)
    cell = (width - _MARGIN - left) / plan.steps
    y = head
    for section in sections:
        _draw_section(pen, section, colours, left, y, cell)
        y += section.height + _GAP
    _draw_axis(pen, plan.steps, left, y, cell)
    _draw_foot(pen, plan, colours, y + 34, width)
    return image


def _colours(plan: Plan) -> dict[str, tuple[str, str]]:
    """Name and colour of every character that occurs, in the order of the legend."""
    used = set("".join(plan.rows))
    spare = iter(_SPARE * 2)
    found = {
        symbol: (name, _COLOURS.get(name) or next(spare)) for symbol, name in plan.legend.items() if symbol in used
    }
    return found | ({" ": (_NOT_REACHED, _NOWHERE)} if " " in used else {})


def _draw_heading(pen: ImageDraw.ImageDraw, heading: list[str], plan: Plan, width: float) -> None:
    y = _MARGIN + _TITLE / 2
    for line in heading:
        write(pen, _MARGIN, y, line, _TITLE)
        y += _TITLE * _LINE
    about = f"{plan.kind} of {plan.model}, {plan.steps} evaluations"
    write(pen, _MARGIN, y - 1, clip(about, _SMALL, width - 2 * _MARGIN), _SMALL, FAINT)


def _draw_section(
    pen: ImageDraw.ImageDraw,
    section: _Section,
    colours: dict[str, tuple[str, str]],
    left: float,
    top: float,
    cell: float,
) -> None:
    """Labels, then one box for every run of equal cells in a row, with hairlines between steps and tall rows."""
    count = len(section.sites)
    middle = top + section.height / 2
    roomy = section.height >= 28
    write(pen, _MARGIN, middle - (7 if count > 1 and roomy else 0), section.kind.value, _LABEL)
    if count > 1 and roomy:
        write(pen, _MARGIN, middle + 7, f"{count} sites", _SMALL, FAINT)
    for name, start, height in section.sides():
        x, y = left - 6, top + start
        box(pen, x, y + 1, 1, height - 2, RULE)
        if height >= _SMALL:
            write(pen, x - 5, y + height / 2, name, _SMALL, FAINT, anchor="rm")
    hairline = 0.5 if section.row_height >= 8 else 0.0
    height = section.height / count
    for number, row in enumerate(section.rows):
        y = top + number * height
        for step, symbol in enumerate(row):
            box(pen, left + step * cell, y, cell, height - hairline, colours[symbol][1])
    for step in range(1, len(section.rows[0])):
        box(pen, left + step * cell - 0.5, top, 1.0 if cell >= 6 else 0.5, section.height, PAPER)


def _draw_axis(pen: ImageDraw.ImageDraw, steps: int, left: float, top: float, cell: float) -> None:
    """Numbers of steps, from 0, as many as fit without crowding."""
    apart = next((apart for apart in (1, 2, 5, 10, 20, 50, 100, 200, 500) if apart * cell >= 20), steps)
    for step in range(0, steps, apart):
        x = left + (step + 0.5) * cell
        pen.line((pixels(x), pixels(top - 5), pixels(x), pixels(top - 2)), fill=FAINT, width=1)
        write(pen, x, top + 4, str(step), _SMALL, FAINT, anchor="mm")
    write(pen, left - 8, top + 4, "step", _SMALL, FAINT, anchor="rm")


def _draw_foot(
    pen: ImageDraw.ImageDraw, plan: Plan, colours: dict[str, tuple[str, str]], top: float, width: float
) -> None:
    x = _MARGIN
    for name, colour in colours.values():
        box(pen, x, top - 5, 10, 10, colour)
        write(pen, x + 15, top, name, _LABEL, TEXT)
        x += 15 + width_of(name, _LABEL) + 18
    for number, line in enumerate(_cost(plan, width)):
        y = top + _LABEL * _LINE + 6 + number * _SMALL * _LINE
        write(pen, _MARGIN, y, line, _SMALL, FAINT)


def _cost(plan: Plan, width: float) -> list[str]:
    """The cost in words, in lines that fit."""
    return [part for line in plan.summary for part in wrap(line, _SMALL, width - 2 * _MARGIN)]
