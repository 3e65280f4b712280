"""What a report says, in numbers: every variant with its costs, its scores and their intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from ..plan import Plan
from .environment import Environment
from .intervals import Case, Interval, Statistic, bootstrap, mean, middle, ratio, unit_of
from .rowfile import Content, Listing, folder_of
from .rows import Job, Row


@dataclass(frozen=True)
class Score:
    """A number of every row that says how good a picture is.

    Attributes:
        name: of the field in a row.
        label, unit: for readers.
        higher: whether more is better.
        plain: what a picture that is identical to the plain one has; `None` where the plain run has a score too.
        statistic: over prompts and seeds.
        digits: that are printed after the point.
    """

    name: str
    label: str
    unit: str
    higher: bool
    plain: float | None
    statistic: Statistic
    digits: int


SCORES = (
    Score("psnr", "PSNR", "dB", True, float("inf"), middle, 1),
    Score("ssim", "SSIM", "", True, 1.0, middle, 3),
    Score("feature_distance", "Feature distance", "", False, 0.0, middle, 3),
    Score("lpips", "LPIPS", "", False, 0.0, middle, 3),
    Score("agreement", "Prompt agreement", "", True, None, mean, 3),
    Score("clip_score", "CLIP score", "", True, None, mean, 2),
)


@dataclass(frozen=True)
class Finding:
    """One variant.

    Attributes:
        listing: its expression and label.
        baseline: whether nobody asked for it but as a baseline.
        seconds, speed_up: medians over cases, and plain over own.
        evaluations, macs, macs_papers, counted, held, peak_memory, resident: as in its rows; multiply-adds are means
            (they differ where a method decides while it runs), memory is at most.
        macs_ratio: how many times fewer multiply-adds than plain.
        scores: by name; those that its rows hold.
        plan: its table of decisions.
        pairs: of prompt and seed.
    """

    listing: Listing
    baseline: bool
    seconds: Interval
    speed_up: Interval
    evaluations: int
    macs: int
    macs_papers: int
    counted: int | None
    macs_ratio: float
    held: int
    peak_memory: int | None
    resident: int | None
    scores: dict[str, Interval]
    plan: Plan
    pairs: int

    @property
    def plain(self) -> bool:
        """Whether this is the run that all others are compared with."""
        return self.listing.method == "plain"


@dataclass(frozen=True)
class Evidence:
    """Everything that a report shows.

    Attributes:
        path: the file of rows.
        setting: model and settings, common to all rows.
        environment: where it was measured.
        findings: the plain run first, then the methods, each before its baselines.
        prompts, seeds: that were drawn.
        unit: what the intervals resample.
        missing: rows that an interrupted run has not written yet.
    """

    path: Path
    setting: Job
    environment: Environment
    findings: list[Finding]
    prompts: list[str]
    seeds: list[int]
    unit: str
    missing: int

    @property
    def scores(self) -> list[Score]:
        """Those that were measured."""
        return [score for score in SCORES if any(score.name in finding.scores for finding in self.findings)]


def gather(path: Path) -> Evidence:
    """Read a file of rows, with the plans beside it.

    Raises:
        ValueError: it is no file of rows, holds none of the plain run, or mixes settings; or a plan is missing.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path} of rows; `whenwhere bench --out {path}` writes one.")
    content = Content.read(path)
    groups: dict[str, list[Row]] = {}
    for row in content.rows:
        groups.setdefault(row.job.method, []).append(row)
    if "plain" not in groups:
        raise ValueError(f"{path} has no row of the plain run to compare with.")
    first = content.rows[0].job.setting
    for number, row in enumerate(content.rows):
        if different := first.differences(row.job.setting):
            raise ValueError(
                f"{path} mixes runs: row {number + 1} differs from the first ({'; '.join(different)}). "
                "Put every setting into a file of its own."
            )
    plain = groups["plain"]
    listings = _in_order([listing for listing in content.listings if listing.method in groups])
    if unlisted := set(groups) - {listing.method for listing in listings}:
        raise ValueError(
            f"{path} does not list {sorted(unlisted)[0]}; run `whenwhere bench` again with the same options."
        )
    asked = {listing.method for listing in content.listings if listing.baselines}
    served = {method for listing in content.listings for method in listing.baselines}
    findings = [
        _finding(listing, groups[listing.method], plain, listing.method in served - asked, folder_of(path))
        for listing in listings
    ]
    return Evidence(
        path=path,
        setting=first,
        environment=content.environment,
        findings=findings,
        prompts=list(dict.fromkeys(row.job.prompt for row in content.rows)),
        seeds=sorted({row.job.seed for row in content.rows}),
        unit=unit_of(_by_case(plain, lambda row: row.seconds)),
        missing=sum(max(0, content.cases - len(groups.get(listing.method, ()))) for listing in content.listings),
    )


def _in_order(listings: Sequence[Listing]) -> list[Listing]:
    """The plain run, then every method before its baselines; one that serves two methods stands with the first."""
    known = {listing.method: listing for listing in listings}
    served = {method for listing in listings for method in listing.baselines}
    leading = [listing for listing in listings if listing.method not in served]
    order = [method for listing in leading for method in (listing.method, *listing.baselines)]
    return [known[method] for method in dict.fromkeys([*order, *known]) if method in known]


def _finding(listing: Listing, rows: list[Row], plain: list[Row], baseline: bool, folder: Path) -> Finding:
    first = rows[0]
    seconds = _by_case(rows, lambda row: row.seconds)
    scores = {
        score.name: bootstrap(score.statistic, values)
        for score in SCORES
        if (values := _by_case(rows, lambda row, name=score.name: getattr(row, name)))  # type: ignore[misc]
    }
    file = folder / f"{listing.key}.plan.json"
    if not file.is_file():
        raise ValueError(f"the plan of {listing.label} is missing: {file}. Keep the folder {folder} beside the rows.")
    return Finding(
        listing=listing,
        baseline=baseline,
        seconds=bootstrap(middle, seconds),
        speed_up=bootstrap(ratio, _by_case(plain, lambda row: row.seconds), seconds),
        evaluations=first.evaluations,
        macs=round(fmean(row.macs for row in rows)),
        macs_papers=round(fmean(row.macs_papers for row in rows)),
        counted=first.counted,
        macs_ratio=plain[0].macs / fmean(row.macs for row in rows),
        held=max(row.held for row in rows),
        peak_memory=max((row.peak_memory for row in rows if row.peak_memory is not None), default=None),
        resident=max((row.resident for row in rows if row.resident is not None), default=None),
        scores=scores,
        plan=Plan.load(file),
        pairs=len(seconds),
    )


def _by_case(rows: Sequence[Row], value: Callable[[Row], float | None]) -> Mapping[Case, float]:
    """One number per prompt and seed: the median over the repetitions."""
    found: dict[Case, list[float]] = {}
    for row in rows:
        if (number := value(row)) is not None:
            found.setdefault((row.job.prompt, row.job.seed), []).append(number)
    return {case: median(numbers) for case, numbers in found.items()}
