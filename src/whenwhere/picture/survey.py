"""A survey of smoothness as a picture: surface, change map, similarity, Jacobians, fusions, one below the other."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from .ink import FAINT, RULE, box, clip, sheet_of_paper, write

_WIDTH, _MARGIN, _LEFT = 620.0, 18.0, 74.0  # points
_PANEL, _HEAD = 130.0, 30.0
_LIGHT, _DARK = (0xF2, 0xF6, 0xFA), (0x1F, 0x4E, 0x79)
_SERIES = ("#1F4E79", "#E69F00", "#009E73", "#CC79A7", "#D55E00")

Pen = ImageDraw.ImageDraw


def draw_survey(found: Mapping[str, Any], title: str) -> Image.Image:
    """What `bench.survey.survey` found.

    Args:
        found: its result; panels without numbers are left out.
        title: what to write above it.
    """
    panels: list[tuple[str, Any]] = []
    surface = found["surface"][0]
    panels.append(
        (f"1 - cos under perturbed weights, step {surface['step']}", [[1 - v for v in row] for row in surface["first"]])
    )
    panels.append(
        ("change of every block (rows) from step to step (columns), relative L1", found["change"]["relative"])
    )
    if "similarity" in found:
        label = f"1 - cos of cached and plain predictions at every step, {found['similarity']['method']}"
        panels.append((label, {"mean": [1 - v for v in found["similarity"]["mean"]]}))
    if "jacobians" in found:
        norms = {f"step {row['step']}": row["norms"] for row in found["jacobians"]}
        panels.append(("largest singular value of every block's Jacobian", norms))
    if "fusions" in found:
        halves = {half: [row[half][0] for row in found["fusions"]] for half in ("stream", "skip")}
        panels.append(("largest singular value of every fusion, half for the stream and half for the skip", halves))
    image, pen = sheet_of_paper(_WIDTH, 2 * _MARGIN + 24 + len(panels) * (_PANEL + _HEAD + 14))
    write(pen, _MARGIN, _MARGIN + 7, clip(title, 14, _WIDTH - 2 * _MARGIN), 14)
    y = _MARGIN + 30
    for label, values in panels:
        write(pen, _MARGIN, y, label, 11)
        (_heat if isinstance(values, list) else _bars)(pen, values, y + _HEAD - 12)
        y += _PANEL + _HEAD + 14
    return image


def _heat(pen: Pen, rows: Sequence[Sequence[float]], top: float) -> None:
    """A table of numbers as shades, the largest darkest."""
    most = max(max(row) for row in rows) or 1.0
    width, height = (_WIDTH - _MARGIN - _LEFT) / len(rows[0]), _PANEL / len(rows)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            share = math.sqrt(max(value, 0.0) / most)
            colour = "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(_LIGHT, _DARK, strict=True))
            box(pen, _LEFT + j * width, top + i * height, width, height, colour)
    write(pen, _LEFT - 8, top + 6, f"{most:.3g}", 9, FAINT, anchor="rm")
    write(pen, _LEFT - 8, top + 18, "darkest", 9, FAINT, anchor="rm")


def _bars(pen: Pen, series: Mapping[str, Sequence[float]], top: float) -> None:
    """Groups of bars from zero, a colour for every series."""
    most = max(max(values) for values in series.values()) or 1.0
    count = len(next(iter(series.values())))
    group = (_WIDTH - _MARGIN - _LEFT) / count
    bar = 0.8 * group / len(series)
    for number, values in enumerate(series.values()):
        for i, value in enumerate(values):
            height = max(0.5, _PANEL * max(value, 0.0) / most)
            x = _LEFT + i * group + number * bar
            box(pen, x, top + _PANEL - height, bar, height, _SERIES[number % len(_SERIES)])
    box(pen, _LEFT, top + _PANEL, _WIDTH - _MARGIN - _LEFT, 0.5, RULE)
    write(pen, _LEFT - 8, top + 6, f"{most:.3g}", 9, FAINT, anchor="rm")
    for number, name in enumerate(series):
        write(pen, _LEFT - 8, top + 24 + 13 * number, name, 9, _SERIES[number % len(_SERIES)], anchor="rm")
