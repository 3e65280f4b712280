"""Grids of pictures side by side, with a heading over every column and a label before every row."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw
from torch import Tensor

from .ink import FAINT, PAPER, TEXT, box, clip, pixels, sheet_of_paper, width_of, wrap, write

_MARGIN = 18.0
_TITLE, _LABEL, _SMALL = 14.0, 11.0, 9.0
_LINE = 1.35
_GAP = 8.0
_FRAME = "#E4E7EC"
_LABEL_WIDTH = 110.0  # at most, of the labels before the rows


@dataclass(frozen=True)
class Column:
    """Pictures that belong together, from top to bottom.

    Attributes:
        heading: what they are.
        notes: smaller lines under the heading.
        pictures: one per row.
        apart: whether more room is left before this column.
    """

    heading: str
    pictures: Sequence[Image.Image]
    notes: Sequence[str] = ()
    apart: bool = False


def draw_sheet(
    columns: Sequence[Column], rows: Sequence[str] = (), title: str = "", subtitle: str = "", edge: float = 112.0
) -> Image.Image:
    """Pictures of any size side by side, every one `edge` points wide; small ones are enlarged without blur."""
    page = _Page(columns, rows, title, subtitle, edge)
    image, pen = sheet_of_paper(page.width, page.top + page.count * (page.height + _GAP) - _GAP + _MARGIN)
    room = page.width - 2 * _MARGIN
    write(pen, _MARGIN, _MARGIN + _TITLE / 2, clip(title, _TITLE, room), _TITLE)
    write(pen, _MARGIN, page.over - _SMALL * _LINE / 2, clip(subtitle, _SMALL, room), _SMALL, FAINT)
    x = page.left
    for column in columns:
        x += 2 * _GAP if column.apart else 0
        _draw_column(image, pen, page, column, x)
        x += edge + _GAP
    for number, row in enumerate(rows):
        text = wrap(row, _SMALL, page.gutter)
        middle = page.top + number * (page.height + _GAP) + page.height / 2
        for line, label in enumerate(text):
            write(pen, _MARGIN, middle + (line - (len(text) - 1) / 2) * _SMALL * _LINE, label, _SMALL, FAINT)
    return image


class _Page:
    """Where everything stands on a sheet."""

    def __init__(self, columns: Sequence[Column], rows: Sequence[str], title: str, subtitle: str, edge: float) -> None:
        self.edge = edge
        self.gutter = min(_LABEL_WIDTH, max((width_of(row, _SMALL) for row in rows), default=0.0))
        self.left = _MARGIN + (self.gutter + 10 if self.gutter else 0)
        self.lines = max(len(wrap(column.heading, _LABEL, edge)) for column in columns)
        notes = max(len(column.notes) for column in columns)
        self.height = max(edge * picture.height / picture.width for column in columns for picture in column.pictures)
        self.count = max(len(column.pictures) for column in columns)
        apart = sum(column.apart for column in columns) * 2 * _GAP
        self.width = self.left + len(columns) * (edge + _GAP) - _GAP + apart + _MARGIN
        self.over = _MARGIN + (_TITLE * _LINE if title else 0) + (_SMALL * _LINE if subtitle else 0)
        self.headings = self.over + (10 if title or subtitle else 0)
        self.top = self.headings + self.lines * _LABEL * _LINE + notes * _SMALL * _LINE + 6


def _draw_column(image: Image.Image, pen: ImageDraw.ImageDraw, page: _Page, column: Column, x: float) -> None:
    """A heading, whose last line stands as low as that of its neighbours, its notes, and the pictures."""
    heading = wrap(column.heading, _LABEL, page.edge)
    y = page.headings + (page.lines - len(heading) + 0.5) * _LABEL * _LINE
    for line in heading:
        write(pen, x, y, line, _LABEL, TEXT)
        y += _LABEL * _LINE
    for line in column.notes:
        write(pen, x, y - 1, clip(line, _SMALL, page.edge), _SMALL, FAINT)
        y += _SMALL * _LINE
    for number, picture in enumerate(column.pictures):
        top = page.top + number * (page.height + _GAP)
        box(pen, x - 0.5, top - 0.5, page.edge + 1, page.edge * picture.height / picture.width + 1, _FRAME)
        image.paste(enlarge(picture, pixels(page.edge)), (pixels(x), pixels(top)))


def as_image(picture: Tensor) -> Image.Image:
    """A picture (3, H, W) with values in [0, 1]."""
    levels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().cpu()
    return Image.frombytes("RGB", (levels.shape[1], levels.shape[0]), levels.numpy().tobytes())


def enlarge(picture: Image.Image, width: int) -> Image.Image:
    """A picture at another width: small ones enlarged with hard pixels, large ones reduced smoothly."""
    size = (width, max(1, round(picture.height * width / picture.width)))
    kind = Image.Resampling.NEAREST if width >= picture.width else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize(size, kind)


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other, on white."""
    whole = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), PAPER)
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    return whole


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures next to each other, on white."""
    whole = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), PAPER)
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width
    return whole
