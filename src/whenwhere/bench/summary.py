"""Rows in a few numbers per variant: medians, with the number of runs and their spread."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from .rows import Row


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing: their median, the lowest, the highest, and how many there are."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        return cls(median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Summary:
    """One variant.

    Attributes:
        method: its expression with every field; "plain" for none.
        seconds, denoising: of all its runs.
        speed_up, denoising_speed_up: median of the plain runs over median of its own; they took turns.
        macs_ratio: how many times fewer multiply-adds than plain.
        macs, macs_papers, counted, counted_papers, bytes, held, peak_memory, evaluations: as in its rows; multiply-adds
            are means, since they differ where a method decides while it runs.
        psnr, ssim: medians over pictures; `None` for the plain run.
    """

    method: str
    seconds: Spread
    denoising: Spread
    speed_up: float
    denoising_speed_up: float
    macs_ratio: float
    evaluations: int
    macs: int
    macs_papers: int
    counted: int | None
    counted_papers: int | None
    bytes: int
    held: int
    peak_memory: int | None
    psnr: float | None
    ssim: float | None


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """One summary per variant, in the order of their first rows.

    Raises:
        ValueError: there is no row of the plain run, or rows of several models or settings are mixed.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.job.method, []).append(row)
    plain = groups.get("plain")
    if plain is None:
        raise ValueError("there is no row of the plain run to compare with.")
    settings = {row.job.setting for group in groups.values() for row in group}
    if len(settings) > 1:
        raise ValueError(f"rows of {len(settings)} models or settings are mixed; summarise them one by one.")
    return [_summary(group, plain) for group in groups.values()]


def _summary(rows: Sequence[Row], plain: Sequence[Row]) -> Summary:
    first = rows[0]
    seconds, denoising = Spread.of([r.seconds for r in rows]), Spread.of([r.denoising for r in rows])
    peaks = [row.peak_memory for row in rows if row.peak_memory is not None]
    return Summary(
        method=first.job.method,
        seconds=seconds,
        denoising=denoising,
        speed_up=median(row.seconds for row in plain) / seconds.median,
        denoising_speed_up=median(row.denoising for row in plain) / denoising.median,
        macs_ratio=plain[0].macs / fmean(row.macs for row in rows),
        evaluations=first.evaluations,
        macs=round(fmean(row.macs for row in rows)),
        macs_papers=round(fmean(row.macs_papers for row in rows)),
        counted=first.counted,
        counted_papers=first.counted_papers,
        bytes=first.bytes,
        held=first.held,
        peak_memory=max(peaks, default=None),
        psnr=_middle(rows, lambda row: row.psnr),
        ssim=_middle(rows, lambda row: row.ssim),
    )


def _middle(rows: Sequence[Row], value: Callable[[Row], float | None]) -> float | None:
    values = [found for row in rows if (found := value(row)) is not None]
    return median(values) if values else None
