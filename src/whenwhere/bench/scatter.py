"""Quality against cost as a drawing in SVG: up is better, left is cheaper, and a line joins the Pareto front."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ..picture.ink import FAINT, PAPER, RULE, TEXT
from .intervals import Interval

WIDTH, HEIGHT = 460, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 30, 46
_METHOD, _BASELINE, _FRONT = "#1F4E79", "#B45309", "#009E73"
_FONT = "system-ui, 'DejaVu Sans', sans-serif"
_RADIUS = 9.5


@dataclass(frozen=True)
class Point:
    """A variant in the plane: its number and name, whether it is a baseline, its cost and its quality."""

    number: str
    label: str
    baseline: bool
    cost: Interval
    quality: Interval


@dataclass(frozen=True)
class Axis:
    """Values to pixels: `low` is at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Where a value stands."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Four to eight round values."""
        rough = (self.high - self.low) / 5
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.8)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def front(points: Sequence[Point], higher: bool) -> list[Point]:
    """The points that no other beats in both: as cheap and better, or as good and cheaper; the cheapest first."""
    sign = 1 if higher else -1
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost.value, -sign * point.quality.value)):
        if not found or sign * point.quality.value > sign * found[-1].quality.value:
            found.append(point)
    return found


def scatter(
    points: Sequence[Point], cost: str, quality: str, higher: bool, plain: float | None = None, title: str = ""
) -> str:
    """The drawing, as a whole `svg` element that needs no style sheet.

    Args:
        points: at least one; those without a finite quality are left out.
        cost, quality: what the axes show.
        higher: whether more of the quality is better; where not, its axis runs downwards.
        plain: cost of the plain run, drawn as a line, where its quality is the reference and no point.
        title: what a screen reader says.
    """
    seen = [point for point in points if math.isfinite(point.quality.value)]
    if not seen:
        return ""
    costs = [value for point in seen for value in _ends(point.cost)] + ([plain] if plain is not None else [])
    across = Axis(0.0, max(costs) * 1.06, _LEFT, WIDTH - _RIGHT)
    low, high = _room([value for point in seen for value in _ends(point.quality)])
    ends = (HEIGHT - _BOTTOM, _TOP) if higher else (_TOP, HEIGHT - _BOTTOM)
    up = Axis(low, high, *ends)
    parts = [*_grid(across, up, cost, f"{quality}, {'higher' if higher else 'lower'} is better")]
    if plain is not None:
        x = across(plain)
        parts.append(_line(x, _TOP, x, HEIGHT - _BOTTOM, FAINT, 1.2, "4 4"))
        parts.append(_text(x - 5, _TOP + 10, "plain", FAINT, "end"))
    best = front(seen, higher)
    path = " ".join(f"{across(point.cost.value):.1f},{up(point.quality.value):.1f}" for point in best)
    parts.append(f'<polyline points="{path}" fill="none" stroke="{_FRONT}" stroke-width="5" stroke-opacity="0.35"/>')
    parts += [_bars(point, across, up) for point in seen]
    parts += [_mark(point, across, up) for point in sorted(seen, key=lambda point: not point.baseline)]
    name = escape(title or f"{quality} against {cost}", quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}" '
        f'font-family="{_FONT}" font-size="11.5">{"".join(parts)}</svg>'
    )


def _ends(interval: Interval) -> list[float]:
    """Its finite numbers."""
    return [v for v in (interval.low, interval.value, interval.high) if v is not None and math.isfinite(v)]


def _room(values: Sequence[float]) -> tuple[float, float]:
    """A range around the values, with a margin; never of no width."""
    low, high = min(values), max(values)
    margin = (high - low or abs(high) or 1.0) * 0.1
    return low - margin, high + margin


def _grid(across: Axis, up: Axis, cost: str, quality: str) -> list[str]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>']
    for tick in up.ticks:
        parts.append(_line(_LEFT, up(tick), right, up(tick), RULE, 0.7))
        parts.append(_text(_LEFT - 7, up(tick) + 4, f"{tick:.4g}", FAINT, "end"))
    for tick in across.ticks:
        parts.append(_line(across(tick), bottom, across(tick), bottom + 4, FAINT, 1))
        parts.append(_text(across(tick), bottom + 17, f"{tick:.4g}", FAINT, "middle"))
    parts.append(_line(_LEFT, bottom, right, bottom, FAINT, 1))
    parts.append(_text(right, HEIGHT - 8, cost, TEXT, "end"))
    parts.append(_text(8, 16, quality, TEXT, "start"))
    return parts


def _bars(point: Point, across: Axis, up: Axis) -> str:
    """The intervals of both numbers, as far as they are finite."""
    colour, x, y = _BASELINE if point.baseline else _METHOD, across(point.cost.value), up(point.quality.value)
    parts = []
    if len(ends := _ends(point.quality)) > 1:
        parts.append(_line(x, up(min(ends)), x, up(max(ends)), colour, 1.3))
    if len(ends := _ends(point.cost)) > 1:
        parts.append(_line(across(min(ends)), y, across(max(ends)), y, colour, 1.3))
    return "".join(parts)


def _mark(point: Point, across: Axis, up: Axis) -> str:
    """A disc with its number: full for a method, hollow for a baseline."""
    x, y = across(point.cost.value), up(point.quality.value)
    fill, ink = (PAPER, _BASELINE) if point.baseline else (_METHOD, PAPER)
    edge = _BASELINE if point.baseline else PAPER
    return (
        f"<g><title>{escape(point.label)}: {point.quality.value:.4g} at {point.cost.value:.4g}</title>"
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{_RADIUS}" fill="{fill}" stroke="{edge}" stroke-width="1.6"/>'
        f'<text x="{x:.1f}" y="{y + 4:.1f}" fill="{ink}" text-anchor="middle" font-weight="600" font-size="10.5">'
        f"{escape(point.number)}</text></g>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float, dashes: str = "") -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"{dashed}/>'


def _text(x: float, y: float, text: str, colour: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{escape(text)}</text>'
