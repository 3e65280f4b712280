"""A file of rows as one page of HTML that needs nothing else: no scripts, no requests, readable on a phone."""

import base64
import math
import re
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from PIL import Image

from ..picture import draw_plan
from .evidence import Evidence, Score
from .gallery import AMPLIFIED, Exhibit
from .intervals import RESAMPLES, Interval
from .scatter import Point, front, scatter

if TYPE_CHECKING:
    from .sets import Distances

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_PLAN_WIDTH = 440.0  # points: readable when a phone shows it 360 wide


@dataclass(frozen=True)
class Chart:
    """One score against both costs, and in words who is on the front of seconds."""

    score: Score
    drawings: list[str]
    words: str


def render(evidence: Evidence, exhibits: list[Exhibit], sets: "Distances | None" = None) -> str:
    """The page; with distances of sets to real pictures where they were measured."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "pieces": pieces,
        "png": as_data,
        "short": short,
        "interval": written,
        "macs": macs,
        "bytes": size,
    }
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    methods = [finding for finding in evidence.findings if not finding.baseline and not finding.plain]
    return template.render(
        evidence=evidence,
        plain=evidence.findings[0],
        numbers=numbers(evidence),
        methods=methods,
        charts=charts(evidence),
        exhibits=exhibits,
        sets=sets,
        plans=[(finding, draw_plan(finding.plan, finding.listing.label, _PLAN_WIDTH)) for finding in methods],
        surroundings=asdict(evidence.environment),
        amplified=AMPLIFIED,
        resamples=RESAMPLES,
    )


def numbers(evidence: Evidence) -> dict[str, str]:
    """What every variant is called in charts: P for plain, then 1, 2, 3, ..."""
    return {finding.listing.method: str(n) if n else "P" for n, finding in enumerate(evidence.findings)}


def charts(evidence: Evidence) -> list[Chart]:
    """Every score that was measured, against seconds and against multiply-adds."""
    return [chart for score in evidence.scores if (chart := _chart(evidence, score)).drawings]


def _chart(evidence: Evidence, score: Score) -> Chart:
    plain, named = evidence.findings[0], numbers(evidence)
    apart = score.plain is not None  # the plain run is the reference
    shown = [f for f in evidence.findings if score.name in f.scores and not (apart and f.plain)]
    largest = max((finding.macs for finding in evidence.findings), default=0)
    scale, unit = next((s, u) for s, u in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1, "")) if largest >= s or s == 1)

    def points(by_macs: bool) -> list[Point]:
        return [
            Point(
                named[finding.listing.method],
                finding.listing.label,
                finding.baseline or finding.plain,
                Interval(finding.macs / scale, None, None) if by_macs else finding.seconds,
                finding.scores[score.name],
            )
            for finding in shown
        ]

    label = f"{score.label}, {score.unit}" if score.unit else score.label
    drawings = [
        scatter(points(False), "seconds a picture", label, score.higher, plain.seconds.value if apart else None),
        scatter(points(True), f"{unit}MACs a picture", label, score.higher, plain.macs / scale if apart else None),
    ]
    best = front([point for point in points(False) if math.isfinite(point.quality.value)], score.higher)
    words = ", ".join(f"{point.number} {point.label}" for point in best)
    return Chart(score, [drawing for drawing in drawings if drawing], words)


def pieces(label: str) -> list[str]:
    """An expression in parts between which a line may break."""
    return re.findall(r"[^(+,=]*[(+,=]?", label)[:-1]


def as_data(image: Image.Image) -> str:
    """A picture as the address of itself."""
    stream = BytesIO()
    image.save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def short(value: float, digits: int | None = None) -> str:
    """A number for readers: so many digits after the point, or about three that count."""
    if math.isinf(value):
        return "identical"
    if digits is None:
        digits = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}"


def written(interval: Interval, digits: int | None = None) -> str:
    """The ends of an interval; empty where there is none."""
    if interval.low is None or interval.high is None:
        return ""
    return f"{short(interval.low, digits)} – {short(interval.high, digits)}"


def macs(number: int) -> str:
    """Multiply-adds with three digits and a unit."""
    scale, unit = next((s, u) for s, u in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1, "")) if number >= s or s == 1)
    return f"{number / scale:.3g}{unit}"


def size(number: int | None) -> str:
    """Bytes with a unit; a dash for none."""
    if not number:
        return "–"
    scale, unit = next((s, u) for s, u in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")) if number >= s)
    return f"{number / scale:.3g} {unit}"
