"""The tables of `methods.py`: by target every method and its baselines, and gates that decide beside fixed ones."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from whenwhere.bench.evidence import Evidence, Finding, gather
from whenwhere.bench.intervals import Case, Interval, Numbers, bootstrap, middle
from whenwhere.bench.rowfile import Content
from whenwhere.bench.rows import Row
from whenwhere.bench.variant import Variant

TARGETS = (1.3, 1.6, 2.0, 2.5)
NEAR = 0.12  # how far from its target a setting may be, relatively


@dataclass(frozen=True)
class Setting:
    """What is measured; without a target it goes where its measured cost puts it, or only among the gates."""

    target: float | None
    name: str
    expression: str

    @property
    def method(self) -> str:
        """Its expression as in the rows."""
        return Variant.of(self.expression).expression


def section(rows: Path, settings: Sequence[Setting]) -> str:
    """Markdown of one model: the table of all methods, and that of the gates."""
    evidence, content = gather(rows), Content.read(rows)
    measured: dict[str, list[Row]] = {}
    for row in content.rows:
        measured.setdefault(row.job.method, []).append(row)
    return "\n".join([*_all_methods(evidence, settings), "", *_gates(measured, settings)])


def page_with(page: str, model: str, text: str) -> str:
    """The page with the text between the marks of its model.

    Raises:
        ValueError: the page has no such marks.
    """
    marks = re.compile(rf"(<!-- methods: {re.escape(model)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not marks.search(page):
        raise ValueError(
            f"the page has no place for {model}: write <!-- methods: {model} --> and <!-- end --> into it."
        )
    return marks.sub(lambda m: f"{m[1]}{text}\n{m[2]}", page)


def _all_methods(evidence: Evidence, settings: Sequence[Setting]) -> Iterable[str]:
    found = {finding.listing.method: finding for finding in evidence.findings}
    setting, here = evidence.setting, evidence.environment
    yield (
        f"{setting.steps} steps of {setting.scheduler}, guidance {setting.guidance:g}, one seed for each of "
        f"{len(evidence.prompts)} prompts; {evidence.unit} are resampled for the 95 % intervals. {here.processor}, "
        f"{here.threads} thread, torch {here.torch}, {here.date[:10]}."
    )
    yield ""
    yield "| | setting | fewer MACs | speed-up | seconds | remembered | PSNR, dB | SSIM | prompt agreement |"
    yield "|---|---|---|---|---|---|---|---|---|"
    yield _line("**plain**", next(finding for finding in evidence.findings if finding.plain))
    for target in TARGETS:
        yield f"| **about {target}x** |{' |' * 8}"
        own = [(entry.name, found[entry.method]) for entry in settings if _belongs(entry, target, found)]
        for name, finding in own:
            yield _line(name, finding)
        kin = {method for _, finding in own for method in finding.listing.baselines}
        near = [found[method] for method in kin if abs(found[method].macs_ratio / target - 1) <= NEAR]
        for finding in sorted(near, key=lambda finding: finding.listing.label):
            yield _line("*baseline*", finding)


def _belongs(setting: Setting, target: float, found: Mapping[str, Finding]) -> bool:
    """Whether a setting stands under a target: it was chosen for it, or decides by itself and came nearest to it."""
    if setting.target is not None:
        return setting.target == target
    if not _deciding(setting):
        return False
    ratio = found[setting.method].macs_ratio
    return min(TARGETS, key=lambda other: abs(other / ratio - 1)) == target


def _deciding(setting: Setting) -> bool:
    return any(method.adaptive for method in Variant.of(setting.expression).methods)


def _gates(measured: Mapping[str, Sequence[Row]], settings: Sequence[Setting]) -> Iterable[str]:
    """Gates that decide by themselves beside the fixed ones at equal cost."""
    fixed = {s.method: measured[s.method] for s in settings if s.name == "T-GATE" and s.method in measured}
    ladder = sorted(fixed.values(), key=_macs)
    yield (
        "A gate that decides by itself beside the best fixed gate at equal cost, each prompt against itself: the fixed "
        "one lies between two whole gates, in the proportion that gives the same multiply-adds on the average."
    )
    yield ""
    yield "| setting | fewer MACs | PSNR, dB | fixed gate at that cost, dB | leads by, dB |"
    yield "|---|---|---|---|---|"
    for setting in settings:
        if _deciding(setting):
            yield _beside(setting, measured[setting.method], ladder, measured["plain"])


def _beside(setting: Setting, own: Sequence[Row], ladder: Sequence[Sequence[Row]], plain: Sequence[Row]) -> str:
    mine, cost = _psnr(own), _macs(own)
    cells = [
        f"`{Variant.of(setting.expression).label}`",
        f"{_macs(plain) / cost:.2f}x",
        interval(bootstrap(middle, mine), 1),
    ]
    for cheap, dear in pairwise(ladder):
        if _macs(cheap) <= cost <= _macs(dear):
            share = (cost - _macs(cheap)) / (_macs(dear) - _macs(cheap))
            low, high = _psnr(cheap), _psnr(dear)
            between = {case: (1 - share) * low[case] + share * high[case] for case in mine}
            cells += [interval(bootstrap(middle, between), 1), interval(bootstrap(_lead, mine, between), 2)]
    return f"| {' | '.join([*cells, '', ''][:5])} |"


def _lead(one: Numbers, other: Numbers) -> Numbers:
    """The median difference."""
    return middle(one - other)


def _macs(rows: Sequence[Row]) -> float:
    return fmean(row.macs for row in rows)


def _psnr(rows: Sequence[Row]) -> dict[Case, float]:
    return {(row.job.prompt, row.job.seed): row.psnr for row in rows if row.psnr is not None}


def _line(name: str, finding: Finding) -> str:
    scores = [finding.scores.get(key) for key in ("psnr", "ssim", "agreement")]
    cells = [
        name,
        "" if finding.plain else f"`{re.sub('calibration=[^,]*, ', '', finding.listing.label)}`",
        f"{finding.macs_ratio:.2f}x",
        interval(finding.speed_up, 2) + "x" if not finding.plain else "",
        f"{finding.seconds.value:.3f}",
        f"{finding.held / 1024:.0f} KiB" if finding.held else "",
        *(interval(score, digits) for score, digits in zip(scores, (1, 3, 3), strict=True)),
    ]
    return f"| {' | '.join(cells)} |"


def interval(score: Interval | None, digits: int) -> str:
    """A number with the ends of its interval; empty for none."""
    if score is None:
        return ""
    if score.low is None or score.high is None:
        return f"{score.value:.{digits}f}"
    return f"{score.value:.{digits}f} ({score.low:.{digits}f} to {score.high:.{digits}f})"
